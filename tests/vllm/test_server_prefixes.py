"""Memories without tensors: prefixes in a vLLM server's own cache, separate for each tenant."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmem.engines.huggingface.backend import HFBackend
from kvmem.engines.vllm.server.backend import VLLMServerBackend
from kvmem.errors import FingerprintError, InjectionError, MergeError, StorageError
from tests.helpers.tiny import memory_on
from tests.vllm.serving import CACHE_TOKENS, NEW_TOKENS, QUERY, TEXTS, Connect, as_turns, on_server, whole_blocks

pytestmark = pytest.mark.timeout(420)


def test_a_prefix_on_the_server_answers_as_the_prompt_does(
    prefixes: VLLMServerBackend, smollm2: HFBackend, tmp_path: Path
) -> None:
    memory = on_server(prefixes)
    memory.add(memory.extract(TEXTS[2]))
    (item,) = memory.get_all()
    assert item.kv_cache.get_seq_length() == 0 and item.metadata.kv_bytes == 0
    reference = smollm2.generate(as_turns(TEXTS[2], QUERY), max_new_tokens=NEW_TOKENS)
    answer = prefixes.generate(QUERY, memory.get_cache(item.kv_cache_id), NEW_TOKENS)
    assert answer.token_ids == reference.token_ids
    assert answer.local_tokens == whole_blocks(item.metadata.token_count) > 0

    memory.dump(tmp_path)  # token ids, and no tensors
    assert memory.load(tmp_path) == 1
    assert memory.get_all()[0].metadata.tokens == item.metadata.tokens
    with pytest.raises(FingerprintError, match="another model"):
        memory_on(smollm2).load(tmp_path)
    pickled = on_server(prefixes, memory_filename="memory.pickle")
    pickled.add(item)
    with pytest.raises(StorageError, match=r"prefix on a server.*\.safetensors"):
        pickled.dump(tmp_path)


@pytest.mark.parametrize("merge", ["RopeShift", "NaiveConcat"])
def test_a_merge_that_needs_tensors_refuses_prefixes_by_name(prefixes: VLLMServerBackend, merge: str) -> None:
    memory = on_server(prefixes, merge=merge)
    memory.add(memory.extract([text[:300] for text in TEXTS[:2]]))
    with pytest.raises(MergeError, match=rf"{merge} needs tensors; .* prefix on a server\. Use merge=Reprefill"):
        memory.get_cache([item.kv_cache_id for item in memory.get_all()])


def test_tenants_never_hit_each_others_blocks(prefixes: VLLMServerBackend, connect: Connect) -> None:
    turns = as_turns(TEXTS[3], QUERY)
    first, other, again = (prefixes.generate(turns, None, 2, cache_salt=f"tenant {name}") for name in "aba")
    assert (first.cached_tokens, other.cached_tokens) == (0, 0)
    assert again.cached_tokens == whole_blocks(again.prompt_tokens - 1) > 0

    memory = on_server(prefixes)
    memory.add(memory.extract(TEXTS[4]))  # for the configuration's tenant
    (item,) = memory.get_all()
    cache_view = memory.get_cache(item.kv_cache_id)
    with pytest.raises(InjectionError, match=r"not warmed up .*'tenant c'.*warm_up"):
        prefixes.generate(QUERY, cache_view, 2, cache_salt="tenant c")
    lax = connect(cache_salt="prefixes", on_miss="recompute").backend
    assert lax.generate(QUERY, cache_view, 2, cache_salt="tenant c").cached_tokens == 0
    held = prefixes.warm_up(item, cache_salt="tenant d")
    assert prefixes.generate(QUERY, cache_view, 2, cache_salt="tenant d").cached_tokens == held > 0


def test_a_prefix_that_was_evicted_is_a_miss_and_not_slow(prefixes: VLLMServerBackend, connect: Connect) -> None:
    memory = on_server(prefixes)
    rare = [f"Told in no other test. {text}" for text in (TEXTS[5], TEXTS[4])]  # the server has not learned them
    memory.add(memory.extract(rare))
    first, second = memory.get_all()
    lax = connect(cache_salt="prefixes", on_miss="recompute").backend
    lax.warm_up(second)
    for round_ in range(CACHE_TOKENS // 1000 + 1):
        prefixes.answer_prompt(prefixes.template.bare("word " * 1000), cache_salt=f"traffic {round_}")
    with pytest.raises(InjectionError, match=r"reused 0: it was evicted.*warm_up"):
        prefixes.generate(QUERY, memory.get_cache(first.kv_cache_id), 2)
    answer = lax.generate(QUERY, memory.get_cache(second.kv_cache_id), 2)
    assert (answer.cached_tokens, answer.recomputed_tokens) == (0, whole_blocks(second.metadata.token_count))
    assert answer.recomputed_tokens > 0
