"""Pinned memories stay whatever the policy ranks, and memories whose time is over are neither served nor kept.

The clock is a number that the tests set.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmem import TextualMemoryItem
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import ArgumentError, ConfigError, UnknownMemoryError
from kvmem.scheduler.lifetimes import Lifetimes
from kvmem.scheduler.scheduler import MemScheduler
from tests.helpers.tiny import memory_on
from tests.scheduler.test_closing import sized
from tests.scheduler.test_scheduler import MEMORIES, QUERY, as_text, scheduler_on, use


def killed(scheduler: MemScheduler) -> None:
    """Leaves the folder as a process does that was killed."""
    scheduler.items.close()
    assert scheduler.journal is not None
    scheduler.journal.close()


def test_a_pin_is_built_at_once_and_outlasts_what_is_used_more(qwen3: HFBackend, tmp_path: Path) -> None:
    with sized(qwen3, tmp_path, 1, 0) as scheduler:
        scheduler.observe(MEMORIES[0], QUERY)
        scheduler.pin("m0")
        assert [move.kind for move in scheduler.tick()] == ["build"]
        use(scheduler, MEMORIES[1], 9)
        assert scheduler.tick() == [] and "pinned" in scheduler.explain("m0")
        scheduler.answer(QUERY, MEMORIES[2], 1)
        assert scheduler.index.tiers() == {"m0": "ram"}, "a miss does not replace it either"
        assert scheduler.unpin("m0") and not scheduler.unpin("m0")
        scheduler.tick()
        assert scheduler.index.tiers() == {"m1": "ram"}


def test_a_pin_ends_and_survives_a_kill_until_then(qwen3: HFBackend, tmp_path: Path) -> None:
    scheduler = sized(qwen3, tmp_path, 1, 0)
    scheduler.lifetimes.clock = lambda: 1000.0
    for memory in MEMORIES[:2]:
        scheduler.observe(memory, QUERY)
    scheduler.pin("m0", ttl_s=60)
    killed(scheduler)
    with sized(qwen3, tmp_path, 1, 0) as again:
        again.lifetimes.clock = lambda: 1059.0
        use(again, MEMORIES[1], 9)
        again.tick()
        assert again.index.tiers() == {"m0": "ram"} and again.list()[0].is_pinned
        again.lifetimes.clock = lambda: 1060.0
        again.tick()
        assert again.index.tiers() == {"m1": "ram"} and not again.list()[0].is_pinned


def test_a_memory_whose_time_is_over_is_neither_served_nor_kept(qwen3: HFBackend, tmp_path: Path) -> None:
    right = as_text(qwen3, MEMORIES[0])
    with scheduler_on(qwen3, tmp_path) as scheduler:
        scheduler.lifetimes.clock = lambda: 1000.0
        scheduler.update(MEMORIES[0], ttl_s=60)
        scheduler.answer(QUERY, MEMORIES[0], 1)
        scheduler.lifetimes.clock = lambda: 1059.0
        assert scheduler.answer(QUERY, MEMORIES[0], 8).cached_tokens > 50
        assert scheduler.list()[0].expires_in_s == 1.0
        scheduler.lifetimes.clock = lambda: 1060.0
        for _ in range(2):
            answer = scheduler.answer(QUERY, MEMORIES[0], 8)
            assert answer.cached_tokens == 0 and answer.token_ids == right
            assert answer.note == "The time to live of m0 is over."
            scheduler.observe(MEMORIES[0], QUERY)
            scheduler.tick()
            assert scheduler.index.texts == {} and scheduler.items.ids() == [] and scheduler.list() == []
        assert scheduler.stats().expirations == 1
        assert not any(MEMORIES[0].memory[:20] in path.read_text() for path in tmp_path.glob("*.json*"))
        scheduler.update(MEMORIES[0])
        scheduler.answer(QUERY, MEMORIES[0], 8)
        assert scheduler.answer(QUERY, MEMORIES[0], 8).cached_tokens > 50, "an update gives it a new life"


@pytest.mark.parametrize("end", ["closed", "killed"])
def test_a_memory_that_ends_while_no_scheduler_runs_is_gone_at_the_next_start(
    qwen3: HFBackend, tmp_path: Path, end: str
) -> None:
    scheduler = sized(qwen3, tmp_path, 0, 2)
    scheduler.lifetimes.clock = lambda: -1e9  # so that its end is in the past for the next scheduler
    scheduler.update(MEMORIES[0], ttl_s=60)
    scheduler.answer(QUERY, MEMORIES[0], 1)
    scheduler.answer(QUERY, MEMORIES[1], 1)
    assert scheduler.index.tiers() == {"m0": "disk", "m1": "disk"}
    scheduler.close() if end == "closed" else killed(scheduler)
    with sized(qwen3, tmp_path, 0, 2) as again:
        assert again.index.tiers() == {"m1": "disk"} and list(again.index.texts) == ["m1"]
        assert again.answer(QUERY, MEMORIES[0], 1).cached_tokens == 0 and "m0" not in again.index.texts
        assert len(list((tmp_path / "kv").glob("*.safetensors"))) == 1
        assert again.forget("m0") is False
        again.answer(QUERY, MEMORIES[0], 1)
        assert "m0" in again.index.texts, "forgetting it forgets its end"


def test_a_time_that_ends_during_an_answer(qwen3: HFBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_on(qwen3)
    scheduler.lifetimes.clock = lambda: 1000.0
    scheduler.update(MEMORIES[0], ttl_s=60)
    generate = qwen3.generate

    def meanwhile(*args: object) -> object:
        answer = generate(*args)  # type: ignore[arg-type]
        scheduler.lifetimes.clock = lambda: 1060.0
        return answer

    monkeypatch.setattr(qwen3, "generate", meanwhile)
    assert scheduler.answer(QUERY, MEMORIES[0], 8).token_ids == as_text(qwen3, MEMORIES[0])
    assert scheduler.items.ids() == []


def test_wrong_pins_and_times(qwen3: HFBackend) -> None:
    scheduler = MemScheduler(memory_on(qwen3), "lru", {"ram": 1 << 20}, costs=scheduler_on(qwen3).loads.costs)
    with pytest.raises(UnknownMemoryError, match="Never observed: m0"):
        scheduler.pin("m0")
    scheduler.observe(MEMORIES[0], QUERY)
    for ttl_s, error in ((0, ConfigError), (-1.0, ConfigError), (float("nan"), ConfigError), ("1", ArgumentError)):
        with pytest.raises(error, match="ttl_s"):
            scheduler.pin("m0", ttl_s)  # type: ignore[arg-type]
        with pytest.raises(error, match="ttl_s"):
            scheduler.update(TextualMemoryItem(id="m1", memory="Another."), ttl_s)  # type: ignore[arg-type]
    assert list(scheduler.index.texts) == ["m0"] and not scheduler.lifetimes.pinned()
    with pytest.raises(ValueError, match="valid number"):
        Lifetimes().restore({"pins": {"m0": None}, "ends": {"m0": "soon"}})
