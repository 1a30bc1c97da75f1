"""Arguments of a wrong type are named errors, before the engine is sent anything."""

from __future__ import annotations

from typing import Any

import pytest

from kvmem import KVCacheMemory
from kvmem.engines.vllm.backend import VLLMBackend
from kvmem.engines.vllm.requests import GenerationRequest, VLLMGeneration
from kvmem.errors import ArgumentError, PromptError

QUERY = "What does it say?"


def test_wrong_kinds_are_refused_and_the_next_request_runs(engine: VLLMBackend, memory: KVCacheMemory) -> None:
    item = memory.extract("The dial says seven, and it has said so for a week.")
    wrong: list[tuple[Any, ...]] = [(QUERY, item), (QUERY, None, "3"), (QUERY, None, 3, 0.7)]
    for arguments in wrong:
        for method in (engine.generate, engine.stream):
            with pytest.raises(ArgumentError, match="has to be"):
                method(*arguments)
    with pytest.raises(PromptError, match="A query is a text"):
        engine.generate(3)  # type: ignore[arg-type]
    memory.add(item)
    assert engine.generate(QUERY, memory.get_cache(item.kv_cache_id), 3).cached_tokens > 10


def test_a_wrong_kind_is_one_requests_error(engine: VLLMBackend) -> None:
    wrong, fine = engine.generate_batch([GenerationRequest(QUERY, "an id"), GenerationRequest(QUERY, max_new_tokens=3)])  # type: ignore[arg-type]
    assert isinstance(wrong, ArgumentError) and isinstance(fine, VLLMGeneration)
