"""Namespaces on an engine in this process: a memory is injected, and its blocks are found, only in its own one."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmem.engines.vllm.backend import VLLMBackend
from kvmem.engines.vllm.connector import LOAD
from kvmem.engines.vllm.requests import EngineRequest, GenerationRequest
from kvmem.errors import NamespaceError
from tests.helpers.tiny import pairs
from tests.vllm.conftest import on_engine

QUERY = "Which rule is the first?"
TEXT = pairs(1, 1400, seed=31)[0][0] + " A last rule." * 30


def test_a_memory_is_injected_in_its_own_namespace_only(engine: VLLMBackend) -> None:
    engine.reset()
    memory = on_engine(engine, namespace="acme")
    item = memory.extract(TEXT)
    memory.add(item)
    cache_view = memory.get_cache(item.kv_cache_id)
    first, second = (engine.generate(QUERY, cache_view, 2) for _ in range(2))
    assert (first.local_tokens, first.injected_tokens) == (0, item.metadata.token_count)
    assert second.local_tokens > 0
    refused, fine = engine.generate_batch(
        [GenerationRequest(QUERY, cache_view, 2, cache_salt="other"), GenerationRequest(QUERY, cache_view, 2)]
    )
    assert isinstance(refused, NamespaceError) and fine.token_ids == first.token_ids
    with pytest.raises(NamespaceError, match=r"'acme'.*'other'"):
        engine.pins.pin(item, cache_salt="other")
    for salt in ("other", "acme2", None):  # a request of another namespace that names the file
        ids = engine.split(QUERY, cache_view).ids
        answer = engine.submit(EngineRequest(ids, 1, salt=salt, transfer={LOAD: cache_view.file.name}))
        assert answer.cached_tokens == 0 and "is not a memory of" in answer.report.load_error


def test_blocks_of_a_namespace_are_not_found_in_another(engine: VLLMBackend) -> None:
    engine.reset()
    memories = [on_engine(engine, namespace=namespace) for namespace in ("acme", "other", "")]
    for memory in memories:
        memory.add(memory.extract(TEXT))
    local = [
        engine.generate(QUERY, memory.get_cache(memory.get_all()[0].kv_cache_id), 1).local_tokens
        for memory in (*memories, memories[0])
    ]
    assert local[:3] == [0, 0, 0] and local[3] > 0


def test_a_joined_prefix_and_a_dumped_memory_keep_their_namespace(engine: VLLMBackend, tmp_path: Path) -> None:
    engine.reset()
    memory = on_engine(engine, namespace="acme")
    memory.add(memory.extract([TEXT, TEXT[:600]]))
    joined = memory.get_cache([item.kv_cache_id for item in memory.get_all()])  # prefilled for the namespace
    assert engine.generate(QUERY, joined, 1).local_tokens > 0
    plain = engine.split(QUERY, joined).ids
    assert engine.submit(EngineRequest(plain, 1)).cached_tokens == 0
    with pytest.raises(NamespaceError):
        engine.generate(QUERY, joined, 1, cache_salt="other")
    memory.dump(tmp_path)
    memory.load(tmp_path)
    cache_view = memory.get_cache(memory.get_all()[0].kv_cache_id)
    assert cache_view.namespace == "acme"
    engine.reset()
    assert engine.generate(QUERY, cache_view, 1).injected_tokens == memory.get_all()[0].metadata.token_count
