"""What is in memory at `close` is on disk afterwards where it is worth its bytes, and the next scheduler serves it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import KVMemWarning
from kvmem.scheduler.cost_model import Costs, kv_bytes_a_token
from kvmem.scheduler.scheduler import MemScheduler
from tests.faults.test_scheduler_state import full_disk
from tests.helpers.tiny import memory_on
from tests.scheduler.test_scheduler import MEMORIES, QUERY, as_text, scheduler_on, use


def sized(backend: HFBackend, folder: Path, ram: int, disk: int, disk_s_a_byte: float = 0.0) -> MemScheduler:
    """A scheduler with room for so many of MEMORIES in each tier."""
    costs = Costs(0.001, 1e-4, 0.0, kv_bytes_a_token(backend), {"disk": disk_s_a_byte})
    longest = max(len(backend.template.memory_tokens(memory.memory).token_ids) for memory in MEMORIES)
    budget = {"ram": ram * longest * costs.kv_bytes_a_token, "disk": disk * longest * costs.kv_bytes_a_token}
    return MemScheduler(memory_on(backend), "lfu", budget, folder, costs, max_builds=9)


def test_the_next_scheduler_serves_what_was_in_memory(qwen3: HFBackend, tmp_path: Path) -> None:
    with scheduler_on(qwen3, tmp_path) as scheduler:
        for memory in MEMORIES[:2]:
            scheduler.answer(QUERY, memory, 1)
        assert set(scheduler.index.tiers().values()) == {"ram"}
    assert scheduler.spilled == 2
    with scheduler_on(qwen3, tmp_path) as again:
        for memory in MEMORIES[:2]:
            answer = again.answer(QUERY, memory, 8)
            assert answer.cached_tokens > 50 and answer.token_ids == as_text(qwen3, memory)
        assert again.builds == again.admissions == 0
    assert again.spilled == 0, "it is on disk already"


def test_the_best_replace_what_ranks_below_them(qwen3: HFBackend, tmp_path: Path) -> None:
    with sized(qwen3, tmp_path, 2, 2) as scheduler:
        for uses, memory in enumerate(MEMORIES[:4], start=3):
            use(scheduler, memory, uses)
        scheduler.tick()
        assert scheduler.index.tiers() == {"m3": "ram", "m2": "ram", "m1": "disk", "m0": "disk"}
    with sized(qwen3, tmp_path, 0, 2) as again:
        assert again.index.tiers() == {"m3": "disk", "m2": "disk"}


@pytest.mark.parametrize("why", ["slow loads", "no disk", "not wanted"])
def test_what_is_not_worth_its_bytes_is_dropped(qwen3: HFBackend, tmp_path: Path, why: str) -> None:
    slow = 1.0 if why == "slow loads" else 0.0
    with sized(qwen3, tmp_path, 1, 0 if why == "no disk" else 1, slow) as scheduler:
        use(scheduler, MEMORIES[0], 5)
        scheduler.tick()
        assert scheduler.index.tiers() == {"m0": "ram"}
        if why == "not wanted":
            scheduler.close(spill=False)
    assert scheduler.spilled == 0 and not list((tmp_path / "kv").glob("*.safetensors"))


def on_disk_and_in_ram(backend: HFBackend, folder: Path, disk: int = 4) -> MemScheduler:
    """m0 and m1 in host memory, m2 on disk, which has room for so many."""
    scheduler = sized(backend, folder, 2, disk)
    for uses, memory in zip((5, 4, 3), MEMORIES[:3], strict=True):
        use(scheduler, memory, uses)
    scheduler.tick()
    assert scheduler.index.tiers() == {"m0": "ram", "m1": "ram", "m2": "disk"}
    return scheduler


@pytest.mark.parametrize("disk", [1, 4])
def test_a_full_disk_at_close_raises_nothing_and_keeps_what_is_there(
    qwen3: HFBackend, tmp_path: Path, disk: int
) -> None:
    """Nothing makes room where nothing can be written."""
    scheduler = on_disk_and_in_ram(qwen3, tmp_path, disk)
    with full_disk(1000), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        scheduler.close()
    assert [str(each.message).split(":")[0] for each in told if each.category is KVMemWarning] == [
        "The state was not written at close",
        "What was in memory could not be kept in disk",
    ][: 1 if disk == 1 else 2]
    with sized(qwen3, tmp_path, 2, disk) as again:  # the folder was unlocked, and the journal holds every use
        assert again.index.tiers() == {"m2": "disk"} and again.planner.table.now == 12


def test_a_process_that_ends_while_it_closes_loses_nothing_on_disk(
    qwen3: HFBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = on_disk_and_in_ram(qwen3, tmp_path)
    move, moved = scheduler.items.move, []

    def interrupted(item_id: str, tier: str) -> bool:
        if moved:
            raise KeyboardInterrupt
        moved.append(item_id)
        return move(item_id, tier)

    monkeypatch.setattr(scheduler.items, "move", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scheduler.close()
    with sized(qwen3, tmp_path, 2, 4) as again:
        assert again.index.tiers() == {"m0": "disk", "m2": "disk"} and again.planner.table.now == 12
