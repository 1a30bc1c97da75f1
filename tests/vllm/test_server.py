"""Memories on a vLLM server: files that its connector injects, and prefixes in its cache, by its own counts."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmem.engines.generation import Sampling
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.engines.vllm.connector.protocol import ITEM, LOAD, PIN, PREFETCH, REPORT_TO, SAVE, UNPIN
from kvmem.engines.vllm.requests import EngineRequest, GenerationRequest, VLLMGeneration
from kvmem.engines.vllm.server.backend import VLLMServerBackend
from kvmem.errors import ConfigError, InjectionError, PromptError
from tests.helpers.tiny import memory_on, pairs
from tests.vllm.serving import MODEL, NEW_TOKENS, QUERY, TEXTS, as_turns, on_server, whole_blocks

pytestmark = pytest.mark.timeout(420)


def test_four_routes_to_the_same_tokens(files: VLLMServerBackend, smollm2: HFBackend, tmp_path: Path) -> None:
    questions = pairs(2, 900, seed=12)
    transformers, ours, other = memory_on(smollm2), on_server(files), on_server(files)
    transformers.add(transformers.extract([text for text, _ in questions]))
    transformers.dump(tmp_path)
    other.load(tmp_path)
    ours.add(ours.extract([text for text, _ in questions]))
    transformers.delete_all()
    transformers.add(ours.get_all())  # and back: transformers loads what the server saved
    total_native = 0
    for (text, query), item, foreign in zip(questions, ours.get_all(), other.get_all(), strict=True):
        reference = smollm2.generate(as_turns(text, query), max_new_tokens=NEW_TOKENS)
        direct, native = (files.generate(as_turns(text, query), None, NEW_TOKENS, cache_salt="direct") for _ in "12")
        injected = files.generate(query, ours.get_cache(item.kv_cache_id), NEW_TOKENS, cache_salt="injected")
        from_transformers = files.generate(
            query, other.get_cache(foreign.kv_cache_id), NEW_TOKENS, cache_salt="transformers"
        )
        back = smollm2.generate(query, transformers.get_cache(item.kv_cache_id), NEW_TOKENS)
        assert back.cached_tokens == item.metadata.token_count
        for answer in (direct, native, injected, from_transformers, back):
            assert (answer.token_ids, answer.text) == (reference.token_ids, reference.text)
            assert answer.prompt_tokens == reference.prompt_tokens
        assert direct.cached_tokens == 0
        assert (native.cached_tokens, native.injected_tokens) == (whole_blocks(native.prompt_tokens - 1), 0)
        for answer in (injected, from_transformers):
            assert (answer.local_tokens, answer.injected_tokens) == (0, item.metadata.token_count)
        total_native += native.local_tokens
    assert total_native > 0


def test_streams_give_what_generate_gives_and_have_two_times(files: VLLMServerBackend) -> None:
    memory = on_server(files)
    memory.add(memory.extract(TEXTS[1]))
    cache_view = memory.get_cache(memory.get_all()[0].kv_cache_id)
    whole = files.generate(QUERY, cache_view, 24)
    tokens = list(files.stream(QUERY, cache_view, 24, cache_salt="streamed"))
    assert tuple(token.id for token in tokens) == whole.token_ids
    assert "".join(token.text for token in tokens) == whole.text

    prompt = files.split(QUERY, cache_view)
    timed = files.ttft(prompt, cache_view, 4, cache_salt="timed")
    assert 0 < timed.first_chunk_s <= timed.first_text_s <= timed.whole_s
    assert timed.generation.injected_tokens == len(prompt.memory_ids)
    assert timed.generation == files.answer_prompt(prompt, cache_view, 4, cache_salt="not streamed")
    cold = files.ttft(prompt, None, 4, cache_salt="cold")
    assert cold.generation.cached_tokens == 0

    stream = files.stream(QUERY, cache_view, 64)
    next(stream)
    stream.close()
    assert [path.name for path in files.store.folder.iterdir() if path.suffix == ".report"] == []


def test_sampling_is_its_seeds(files: VLLMServerBackend) -> None:
    def sampled(seed: int) -> VLLMGeneration:
        return files.generate("Tell me a story.", None, 12, Sampling(temperature=1.0, top_p=0.9, top_k=50, seed=seed))

    assert sampled(1).token_ids == sampled(1).token_ids != sampled(2).token_ids


def test_merges_answer_as_they_do_on_transformers(
    prefixes: VLLMServerBackend, files: VLLMServerBackend, smollm2: HFBackend
) -> None:
    texts = [text[:300] for text in TEXTS[:2]]
    items = on_server(files).extract(texts)
    for backend, merge in ((prefixes, "Reprefill"), (files, "Reprefill"), (files, "RopeShift")):
        memory, transformers = on_server(backend, merge=merge), memory_on(smollm2, merge=merge)
        memory.add(items if backend is files else memory.extract(texts))
        transformers.add(items)
        cache_view = memory.get_cache([item.kv_cache_id for item in memory.get_all()])
        answer = backend.generate(QUERY, cache_view, 8)
        reference = smollm2.generate(QUERY, transformers.get_cache([item.kv_cache_id for item in items]), 8)
        assert answer.token_ids == reference.token_ids
        held = len(cache_view.tokens.token_ids)
        assert answer.injected_tokens == (held if merge == "RopeShift" else 0)
        assert answer.cached_tokens == (held if merge == "RopeShift" else whole_blocks(held)) > 0


def flip_a_bit(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[-1000] ^= 1
    path.write_bytes(whole)


@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink], ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_one_requests_error(
    files: VLLMServerBackend, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    memory = on_server(files)
    memory.add(memory.extract([text[:500] for text in TEXTS[:2]]))
    whole, damaged = [memory.get_cache(item.kv_cache_id) for item in memory.get_all()]
    salt = damage.__name__
    before = [files.generate(QUERY, cache_view, 4, cache_salt=f"{salt}, before") for cache_view in (whole, damaged)]
    damage(damaged.file.path)
    first, second = files.generate_batch(
        [GenerationRequest(QUERY, cache_view, 4, cache_salt=salt) for cache_view in (whole, damaged)]
    )
    assert first == before[0]
    assert isinstance(second, InjectionError) and damaged.file.name in str(second)
    with pytest.raises(InjectionError, match=damaged.file.name):
        list(files.stream(QUERY, damaged, 4, cache_salt=f"{salt}, streamed"))
    monkeypatch.setattr(files.config, "on_miss", "recompute")
    computed = files.generate(QUERY, damaged, 4, cache_salt=f"{salt}, computed")
    assert computed.token_ids == before[1].token_ids
    assert computed.recomputed_tokens == len(files.split(QUERY, damaged).memory_ids)


def test_turns_extend_a_base(files: VLLMServerBackend) -> None:
    memory = on_server(files)
    turns = [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": "I have read it."}]
    more = [{"role": "user", "content": "Thank you."}, {"role": "assistant", "content": "You are welcome."}]
    base = memory.extract(turns)
    extended = memory.extract(more, base=base)
    memory.add(extended)
    answer = files.generate(QUERY, memory.get_cache(extended.kv_cache_id), 8, cache_salt="extended")
    direct = files.generate([*turns, *more, {"role": "user", "content": QUERY}], None, 8, cache_salt="turns")
    assert (answer.token_ids, answer.prompt_tokens) == (direct.token_ids, direct.prompt_tokens)
    assert answer.injected_tokens == extended.metadata.token_count


def test_a_deleted_memory_leaves_the_servers_folder(files: VLLMServerBackend, store: Path) -> None:
    memory = on_server(files)
    memory.add(memory.extract(TEXTS[0]))
    path = files.store.file_of(memory.get_all()[0]).path
    assert path.parent == store and path.is_file()
    memory.delete_all()
    gc.collect()
    assert not path.exists()
    assert (store / "kvmem_server.json").is_file()


def test_files_are_prefetched_into_the_servers_host_memory(files: VLLMServerBackend, store: Path) -> None:
    """In a namespace of its own, of which no other client has a file read."""
    memory = on_server(files, namespace="ahead")
    memory.add(memory.extract(TEXTS[:2]))
    before = files.host_cache()
    assert files.prefetch(memory.get_all()) == 2
    while files.host_cache().reads < before.reads + 2:
        pass
    for item in memory.get_all():
        assert files.generate(QUERY, memory.get_cache(item.kv_cache_id), 2).injected_tokens == item.metadata.token_count
    after = files.host_cache()
    assert (after.hits - before.hits, after.waits - before.waits) == (2, 0)
    with pytest.raises(InjectionError, match=r"not prefetched: .*is not a memory of the namespace 'other'"):
        files.prefetch(memory.get_all(), cache_salt="other")


def test_a_text_longer_than_the_window_names_both_lengths(files: VLLMServerBackend, url: str) -> None:
    with pytest.raises(PromptError, match=rf"\d{{4}} tokens.* 1536 tokens of {MODEL} at {url}.*--max-model-len"):
        files.build("word " * 3000)
    long, fine = files.generate_batch(
        [GenerationRequest("word " * 3000), GenerationRequest("What is a word?", max_new_tokens=4)]
    )
    assert isinstance(long, PromptError)
    assert isinstance(fine, VLLMGeneration) and fine.token_ids
    with pytest.raises(ConfigError, match="max_new_tokens"):
        files.generate(QUERY, None, 0)


def test_malformed_orders_to_the_connector_do_not_harm_the_server(files: VLLMServerBackend, store: Path) -> None:
    before = {path.name for path in store.parent.iterdir()}
    ids = files.template.bare(QUERY).ids
    for transfer in (
        {LOAD: "../../etc/passwd"},
        {LOAD: 7},
        {SAVE: "../escaped.safetensors", ITEM: "{}"},
        {SAVE: "a", ITEM: "no"},
        {LOAD: "none", REPORT_TO: "../escaped"},
        {SAVE: ["a"], ITEM: {}},
        {LOAD: {"name": 1}, UNPIN: 7},
        {LOAD: 1.5, UNPIN: [[]], PIN: []},
        {LOAD: 1, PREFETCH: [7, {}, "../../etc/passwd"]},
    ):
        answer = files.client.complete(EngineRequest(ids, 2, transfer=transfer, salt="stranger"))
        assert answer.report is not None and (answer.report.load_error or answer.report.save_error)
    assert {path.name for path in store.parent.iterdir()} == before
    assert files.generate(QUERY, None, 2).token_ids
