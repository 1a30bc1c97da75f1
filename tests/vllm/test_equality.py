"""One memory on two engines: four routes give the same tokens, and the engine's own count proves each route."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvmem import KVCacheMemory
from kvmem.cache.dynamic_cache import layers_of
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.engines.vllm.backend import VLLMBackend
from kvmem.engines.vllm.requests import GenerationRequest, VLLMGeneration
from tests.helpers.tiny import memory_on, pairs
from tests.vllm.conftest import SETTINGS, on_engine

NEW_TOKENS = 32
BLOCK_TOKENS = 128

IN_A_FRESH_PROCESS = """
import json, sys
from kvmem import KVCacheMemory, KVCacheMemoryConfig
folder, settings, query = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
memory = KVCacheMemory(KVCacheMemoryConfig(extractor_llm={"backend": "vllm", "config": settings}))
memory.load(folder)
(item,) = memory.get_all()
answer = memory.backend.generate(query, memory.get_cache(item.kv_cache_id), 32)
print(json.dumps([answer.token_ids, answer.local_tokens, answer.injected_tokens, item.metadata.token_count]))
"""


def as_turns(text: str, query: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": text}, {"role": "user", "content": query}]


def answers(engine: VLLMBackend, asks: list[GenerationRequest]) -> list[VLLMGeneration]:
    results = engine.generate_batch(asks)
    assert all(isinstance(result, VLLMGeneration) for result in results), results
    return results


def injecting(
    memory: KVCacheMemory, queries: list[str], salt: str, tokens: int = NEW_TOKENS
) -> list[GenerationRequest]:
    """A request for each memory with its query, past end tokens."""
    return [
        GenerationRequest(query, memory.get_cache(item.kv_cache_id), tokens, cache_salt=salt, past_end=True)
        for item, query in zip(memory.get_all(), queries, strict=True)
    ]


def all_injected(memory: KVCacheMemory, results: list[VLLMGeneration]) -> bool:
    return [(result.injected_tokens, result.local_tokens) for result in results] == [
        (item.metadata.token_count, 0) for item in memory.get_all()
    ]


def test_direct_prefix_hit_injected_and_from_the_other_engine(
    engine: VLLMBackend, memory: KVCacheMemory, smollm2: HFBackend, tmp_path: Path
) -> None:
    questions = pairs(20, 600)
    texts, queries = [text for text, _ in questions], [query for _, query in questions]
    wholes = [
        GenerationRequest(as_turns(*pair), None, NEW_TOKENS, cache_salt="direct", past_end=True) for pair in questions
    ]

    direct = answers(engine, wholes)
    assert all(answer.cached_tokens == 0 for answer in direct)
    memory.add(memory.extract(texts))
    reference = memory_on(smollm2)
    reference.add(reference.extract(texts))
    reference.dump(tmp_path / "hf")
    other = on_engine(engine)
    other.load(tmp_path / "hf")

    reused = wholes + injecting(memory, queries, "ours") + injecting(other, queries, "from Hugging Face")
    results = answers(engine, reused)
    native, ours, from_transformers = (results[i : i + len(questions)] for i in range(0, len(results), len(questions)))
    for answer in native:
        assert answer.local_tokens == (answer.prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        assert answer.injected_tokens == 0
    assert sum(answer.local_tokens for answer in native) > 0
    assert all(len(answer.token_ids) == NEW_TOKENS for answer in direct)

    assert all_injected(memory, ours)
    assert all_injected(other, from_transformers)
    for i in range(len(questions)):
        assert direct[i].prompt_tokens == ours[i].prompt_tokens == from_transformers[i].prompt_tokens
        assert native[i].token_ids == ours[i].token_ids == from_transformers[i].token_ids == direct[i].token_ids

    memory.dump(tmp_path / "vllm")
    reference.load(tmp_path / "vllm")
    for i, item in list(enumerate(reference.get_all()))[::10]:
        cache_view = reference.get_cache(item.kv_cache_id)
        prompt = smollm2.split(queries[i], cache_view)
        assert len(prompt.memory_ids) == item.metadata.token_count
        for cache in (cache_view, None):  # the engine's memory in transformers, and transformers alone
            assert smollm2.greedy(prompt, cache, NEW_TOKENS).token_ids == direct[i].token_ids


def test_what_vllm_saves_is_what_transformers_computes(memory: KVCacheMemory, smollm2: HFBackend) -> None:
    text = pairs(1, 1200, seed=5)[0][0]
    built, expected = memory.extract(text), memory_on(smollm2).extract(text)
    assert built.metadata.fingerprint == expected.metadata.fingerprint
    assert built.metadata.tokens == expected.metadata.tokens
    assert built.metadata.kv_bytes == expected.metadata.kv_bytes
    for built_layer, expected_layer in zip(layers_of(built.kv_cache), layers_of(expected.kv_cache), strict=True):
        for a, b in zip(built_layer, expected_layer, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_a_batch_of_sixteen_answers_as_one_by_one(engine: VLLMBackend, memory: KVCacheMemory) -> None:
    questions = pairs(16, 500, seed=3)
    memory.add(memory.extract([text for text, _ in questions]))
    queries = [query for _, query in questions]
    together = answers(engine, injecting(memory, queries, "together", 16))
    assert all_injected(memory, together)
    for item, query, answer in list(zip(memory.get_all(), queries, together, strict=True))[::8]:
        cache_view = memory.get_cache(item.kv_cache_id)
        (alone,) = answers(engine, [GenerationRequest(query, cache_view, 16, cache_salt="alone", past_end=True)])
        assert alone == answer


@pytest.mark.timeout(600)
def test_a_fresh_process_computes_no_token_of_a_dumped_memory(
    engine: VLLMBackend, memory: KVCacheMemory, tmp_path: Path
) -> None:
    ((text, query),) = pairs(1, 1200, seed=4)
    item = memory.extract(text)
    memory.add(item)
    here = engine.generate(query, memory.get_cache(item.kv_cache_id), NEW_TOKENS)
    memory.dump(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", IN_A_FRESH_PROCESS, str(tmp_path), json.dumps(SETTINGS), query],
        capture_output=True,
        text=True,
        check=True,
    )
    ids, local_tokens, injected_tokens, memory_tokens = json.loads(done.stdout.splitlines()[-1])
    assert tuple(ids) == here.token_ids
    assert (local_tokens, injected_tokens) == (0, memory_tokens)
