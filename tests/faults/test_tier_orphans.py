"""Files of earlier processes in a tier: deleted after the stated time, whatever the clock of the day does."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from kvmem.engines.huggingface import HFBackend
from kvmem.tiers import DiskStore, TieredCache
from tests.scheduler.test_scheduler import MEMORIES, QUERY, as_text, scheduler_on, use

YEARS_S = 30 * 365 * 86400.0


def left_behind(backend: HFBackend, folder: Path) -> tuple[Path, Path, Path]:
    """A good file, a damaged one, and one of another program, in a tier that was closed."""
    tiers = TieredCache(backend, {"disk": 1 << 30}, folder)
    items = [backend.build(memory.memory, textual_memory=memory) for memory in MEMORIES[:2]]
    for item in items:
        tiers.put(item, "disk")
    tiers.close()
    good, damaged = (DiskStore.file_of(folder, item.kv_cache_id) for item in items)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    foreign = folder / "notes.safetensors"
    foreign.write_bytes(b"a file of another program")
    return good, damaged, foreign


def test_a_file_that_can_not_be_used_is_deleted_after_its_time(qwen3: HFBackend, tmp_path: Path) -> None:
    good, damaged, foreign = left_behind(qwen3, tmp_path)
    tiers = TieredCache(qwen3, {"disk": 1 << 30}, tmp_path)  # 24 hours
    tiers.collect_orphans()
    tiers.close()
    assert damaged.exists() and damaged.name in tiers.refused
    tiers = TieredCache(qwen3, {"disk": 1 << 30}, tmp_path, orphans_after_s=0.0)
    tiers.collect_orphans()
    tiers.close()
    assert not damaged.exists() and good.exists() and foreign.exists()
    assert list(tiers.refused) == [foreign.name] and len(tiers.ids()) == 1


def test_unfinished_files_are_deleted_when_the_tier_is_opened(qwen3: HFBackend, tmp_path: Path) -> None:
    good, _, _ = left_behind(qwen3, tmp_path)
    partial = tmp_path / f".{good.name}.{'0' * 32}.partial"
    partial.write_bytes(b"the half of a memory")
    TieredCache(qwen3, {"disk": 1 << 30}, tmp_path).close()
    assert good.exists() and not partial.exists()


@pytest.mark.parametrize("years_s", [-YEARS_S, YEARS_S])
def test_a_clock_that_jumps_changes_nothing(
    qwen3: HFBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, years_s: float
) -> None:
    """The clock of the day jumps under an open scheduler with KV on disk, and again before the next one opens."""
    with scheduler_on(qwen3, tmp_path, ram=0) as scheduler:
        use(scheduler, MEMORIES[0], 6)
        scheduler.tick()
        true_s, true_ns = time.time, time.time_ns
        monkeypatch.setattr(time, "time", lambda: true_s() + years_s)
        monkeypatch.setattr(time, "time_ns", lambda: true_ns() + int(years_s * 1e9))
        use(scheduler, MEMORIES[1], 6)
        scheduler.tick()
        assert scheduler.index.tiers() == {"m0": "disk", "m1": "disk"}
        before = scheduler.planner.state()
    _, damaged, _ = left_behind(qwen3, tmp_path / "kv")
    for path in tmp_path.rglob("*"):
        os.utime(path, (true_s() - years_s, true_s() - years_s))
    with scheduler_on(qwen3, tmp_path, ram=0) as again:
        assert again.planner.state() == before and again.index.tiers() == {"m0": "disk", "m1": "disk"}
        for memory in MEMORIES[:2]:
            answer = again.answer(QUERY, [memory], 8)
            assert answer.cached_tokens > 50 and answer.token_ids == as_text(qwen3, memory)
        again.tick()
        assert damaged.exists(), "its 24 hours have not passed"
