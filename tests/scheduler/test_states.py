"""A scheduler over a model with states: memories count their states, and serve whole prefixes only."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmem import TextualMemoryItem
from kvmem.engines.generation import Sampling
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.prompt.template import TokenizedPrompt
from kvmem.scheduler.cost_model import Costs, kv_bytes_a_token
from kvmem.scheduler.scheduler import MemScheduler
from tests.helpers.architectures import tiny_architecture
from tests.helpers.tiny import memory_on

TEXTS = ["Kiwis are flightless birds of New Zealand.", "They lay the largest eggs for their size."]
MEMORIES = [TextualMemoryItem(id=f"m{i}", memory=text) for i, text in enumerate(TEXTS)]
QUERY = "Can kiwis fly?"


@pytest.fixture
def backend() -> HFBackend:
    return tiny_architecture("qwen3_next")


def scheduler_on(backend: HFBackend, folder: Path) -> MemScheduler:
    costs = Costs(0.001, 1e-4, 0.0, kv_bytes_a_token(backend), kv_bytes_a_memory=backend.fingerprint.kv_bytes(0))
    return MemScheduler(memory_on(backend), "benefit_per_byte", {"ram": 1 << 30, "disk": 1 << 30}, folder, costs)


def as_text(scheduler: MemScheduler, memories: list[TextualMemoryItem]) -> tuple[int, ...]:
    prompt = scheduler.backend.template.split(scheduler.index.joint_tokens(memories), QUERY)
    return tuple(scheduler.backend.decode(TokenizedPrompt((), prompt.ids), None, 6, Sampling()))


def test_a_hot_memory_is_built_and_exact(backend: HFBackend, tmp_path: Path) -> None:
    scheduler = scheduler_on(backend, tmp_path)
    for _ in range(4):
        scheduler.observe([MEMORIES[0]], QUERY)
    assert [move.kind for move in scheduler.tick()] == ["build"]
    for _ in range(2):
        answer = scheduler.answer(QUERY, [MEMORIES[0]], 6)
        tokens = len(scheduler.index.joint_tokens([MEMORIES[0]]).token_ids)
        assert answer.cached_tokens == tokens and answer.token_ids == as_text(scheduler, [MEMORIES[0]])
    assert scheduler.items.used_bytes()["ram"] == backend.fingerprint.kv_bytes(tokens)
    assert (
        scheduler.planner.table.nbytes[0] == backend.fingerprint.kv_bytes(tokens) > tokens * kv_bytes_a_token(backend)
    )
    scheduler.close()


def test_a_memory_that_only_begins_as_the_prompt_is_not_used(backend: HFBackend, tmp_path: Path) -> None:
    scheduler = scheduler_on(backend, tmp_path)
    for _ in range(4):
        scheduler.observe([MEMORIES[0]], QUERY)
    scheduler.tick()
    answer = scheduler.answer(QUERY, MEMORIES, 6)
    assert answer.cached_tokens == 0 and answer.token_ids == as_text(scheduler, MEMORIES)
    assert "m0 was not used: the prompt begins with" in answer.note
    assert scheduler.prefix_selector.not_a_prefix == 1
    scheduler.close()
