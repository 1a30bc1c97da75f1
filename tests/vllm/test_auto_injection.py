"""Memories that find themselves: a plain OpenAI client, which knows nothing of memories, by the engine's own counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from openai import OpenAI

from kvmem import KVCacheMemory
from kvmem.engines.vllm.connector.protocol import INJECT, LOAD
from kvmem.engines.vllm.server.backend import VLLMServerBackend
from tests.helpers.tiny import pairs
from tests.vllm.plain_client import chat, metrics
from tests.vllm.serving import KEY, MODEL, NEW_TOKENS, QUERY, as_turns, on_server, whole_blocks

pytestmark = pytest.mark.timeout(420)
TEXTS = [text[:700] for text, _ in pairs(5, 1400, seed=41)]


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=url, api_key=KEY, max_retries=0)


def flip_a_bit(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[-1000] ^= 1
    path.write_bytes(whole)


def replaced(path: Path) -> None:
    """By another memory."""
    other = next(other for other in path.parent.glob("*.safetensors") if other != path)
    copy = path.with_name("copy")
    copy.write_bytes(other.read_bytes())
    copy.replace(path)


def stored(files: VLLMServerBackend, text: str, namespace: str = "") -> KVCacheMemory:
    memory = on_server(files, namespace=namespace)
    memory.add(memory.extract(text))
    return memory


def test_a_client_that_knows_nothing_of_memories_hits_them(client: OpenAI, files: VLLMServerBackend, url: str) -> None:
    text = TEXTS[0]
    cold, cached, _ = chat(client, text, "elsewhere")
    assert cached == 0
    memory = stored(files, text)
    tokens, before = memory.get_all()[0].metadata.token_count, metrics(url)
    answer, cached, report = chat(client, text)
    assert (answer, cached, report) == (cold, tokens, {})
    after = metrics(url)
    for name in ("vllm:external_prefix_cache_hits_total", 'kvmem:prompt_tokens_total{source="memory"}'):
        assert after[name] - before[name] == tokens
    again, cached, report = chat(client, text, kv_transfer_params={INJECT: True})
    assert again == cold and cached == whole_blocks(cached) > 0, "the engine's own cache has as much"
    assert report["injected_tokens"] == 0 and report["memory"]


def test_streams_and_plain_completions_hit_as_well(client: OpenAI, files: VLLMServerBackend) -> None:
    text = TEXTS[1]
    memory = stored(files, text, "acme")
    tokens = memory.get_all()[0].metadata.token_count
    cold, _, _ = chat(client, text, "elsewhere")
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=as_turns(text, QUERY),
            max_tokens=NEW_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"cache_salt": "acme\na"},
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == cold
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == tokens
    prompt = files.split(as_turns(text, QUERY)).ids
    completion = client.completions.create(
        model=MODEL, prompt=list(prompt), max_tokens=NEW_TOKENS, temperature=0, extra_body={"cache_salt": "acme\nb"}
    )
    assert completion.choices[0].text == cold
    assert completion.usage.prompt_tokens_details.cached_tokens == tokens


def test_only_the_memorys_own_namespace_hits_it_and_a_request_may_opt_out(
    client: OpenAI, files: VLLMServerBackend
) -> None:
    text = TEXTS[2]
    cold, _, _ = chat(client, text, "elsewhere")
    memory = stored(files, text, "acme")
    tokens = memory.get_all()[0].metadata.token_count
    for salt in ("acme2", "ACME", "other\nacme", None):
        answer, cached, report = chat(client, text, salt, kv_transfer_params={INJECT: True})
        assert (answer, cached, report["memory"]) == (cold, 0, "")
    assert chat(client, text, "acme\nout", kv_transfer_params={INJECT: False}) == (cold, 0, {})
    answer, cached, report = chat(client, text, "acme\nin", kv_transfer_params={INJECT: True})
    assert (answer, cached) == (cold, tokens)
    path = files.store.file_of(memory.get_all()[0]).path
    assert report["memory"] == path.name and report["injected_tokens"] == tokens
    other = stored(files, TEXTS[3], "acme")  # what a request names wins over what is found
    transfer = {LOAD: files.store.file_of(other.get_all()[0]).path.name}
    answer, cached, report = chat(client, text, "acme\nnamed", kv_transfer_params=transfer)
    assert answer == cold and report["memory"] == "" and cached == report["injected_tokens"] < 32


def test_logits_of_the_whole_prompt_are_computed(client: OpenAI, files: VLLMServerBackend) -> None:
    memory = stored(files, TEXTS[3][:150], "logits")
    tokens = memory.get_all()[0].metadata.tokens.token_ids
    answer = client.completions.create(
        model=MODEL,
        prompt=[*tokens, 7],
        max_tokens=1,
        temperature=0,
        extra_body={"cache_salt": "logits", "prompt_logprobs": 0},
    )
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert len(answer.choices[0].model_extra["prompt_logprobs"]) == len(tokens) + 1


@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink, replaced], ids=lambda damage: damage.__name__)
def test_a_file_that_changes_costs_a_computation_and_is_counted(
    client: OpenAI, files: VLLMServerBackend, url: str, damage: Callable[[Path], object]
) -> None:
    """The index knows the file when it changes."""
    text, salt = TEXTS[4], damage.__name__
    cold, _, _ = chat(client, text, f"elsewhere {salt}")
    _another, memory = stored(files, TEXTS[3], "another"), stored(files, text, salt)
    tokens, path = memory.get_all()[0].metadata.token_count, files.store.file_of(memory.get_all()[0]).path
    assert chat(client, text, salt)[:2] == (cold, tokens)
    before = metrics(url)
    damage(path)
    answer, cached, report = chat(client, text, f"{salt}\nagain", kv_transfer_params={INJECT: True})
    assert answer == cold and cached < 32
    failed = metrics(url)["kvmem:failed_loads_total"] - before["kvmem:failed_loads_total"]
    assert (failed, bool(report["load_error"])) == ((1, True) if damage is flip_a_bit else (0, False))
    answer, cached, report = chat(client, text, f"{salt}\nlater", kv_transfer_params={INJECT: True})
    assert answer == cold and cached < 32 and not report["load_error"], "it is not tried at every request"


def test_metrics_are_the_engines_own_counts(client: OpenAI, files: VLLMServerBackend, url: str) -> None:
    before, text = metrics(url), TEXTS[0]
    memory = stored(files, text, "counted")
    sources = [chat(client, text, salt)[1] for salt in ("counted", "counted", "cold", "counted\nother")]
    assert sources[0] == sources[3] == memory.get_all()[0].metadata.token_count and sources[2] == 0
    after = metrics(url)
    grown = {name: after[name] - before.get(name, 0.0) for name in after}

    def tokens(source: str) -> float:
        return grown[f'kvmem:prompt_tokens_total{{source="{source}"}}']

    assert tokens("engine") == grown["vllm:prefix_cache_hits_total"] > 0
    assert tokens("memory") == grown["vllm:external_prefix_cache_hits_total"] == sources[0] + sources[3]
    assert sum(map(tokens, ("engine", "memory", "computed"))) == grown["vllm:prompt_tokens_total"]
    by_source = [grown[f'kvmem:requests_total{{source="{source}"}}'] for source in ("engine", "host", "file", "none")]
    assert by_source == [1, 1, 1, 2], "the build and one chat are cold"
    assert grown["kvmem:saves_total"] == grown["kvmem:file_reads_total"] == 1
    host = files.host_cache()
    after = metrics(url)
    assert after["kvmem:file_reads_total"] == host.reads and after["kvmem:failed_file_reads_total"] == host.failed_reads
    assert after['kvmem:bytes{tier="host"}'] == host.used_bytes > 0 and after["kvmem:host_files"] == host.files
    assert after['kvmem:bytes{tier="store"}'] > 0 and after["kvmem:store_free_bytes"] > 0
