"""Lost files and a store that is down: memories are sent as text, and the scheduler's thread goes on."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from kvmem import TextualMemoryItem
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.scheduler.cost_model import Costs, kv_bytes_a_token
from kvmem.scheduler.observations import SNAPSHOT_EVERY
from kvmem.scheduler.scheduler import MemScheduler
from tests.helpers.tiny import memory_on
from tests.scheduler.test_scheduler import MEMORIES, QUERY, as_text, scheduler_on, use
from tests.tiers.conftest import FailingLink


def cold_scheduler(backend: HFBackend, url: str, folder: Path | None = None) -> MemScheduler:
    """A scheduler with a cold tier only, whose loads are faster than prefilling."""
    costs = Costs(0.001, 1e-2, 0.0, kv_bytes_a_token(backend), {"cold": 1e-12})
    scheduler = MemScheduler(
        memory_on(backend), "benefit_per_byte", {"cold": 1 << 30}, folder, costs, cold=url, admit_misses=False
    )
    use(scheduler, MEMORIES[0], 6)
    scheduler.tick()
    return scheduler


def alive_after(scheduler: MemScheduler, done: str) -> bool:
    """Whether the scheduler's thread still builds a memory that becomes hot."""
    use(scheduler, next(memory for memory in MEMORIES if memory.id == done), 20)
    until = time.monotonic() + 60
    while done not in scheduler.index.tiers() and time.monotonic() < until:
        time.sleep(0.01)
    return done in scheduler.index.tiers()


def test_a_lost_file_is_answered_as_text_and_built_again(qwen3: HFBackend, tmp_path: Path) -> None:
    scheduler = scheduler_on(qwen3, tmp_path, ram=0, admit_misses=False)
    use(scheduler, MEMORIES[0], 6)
    scheduler.tick()
    for path in (tmp_path / "kv").glob("*.safetensors"):
        path.unlink()
    answer = scheduler.answer(QUERY, [MEMORIES[0]], 8)
    assert answer.cached_tokens == 0 and answer.token_ids == as_text(qwen3, MEMORIES[0])
    assert "m0 was not loaded" in answer.note and scheduler.index.tiers() == {}
    assert scheduler.items.used_bytes() == {"ram": 0, "disk": 0} and scheduler.items.pending_deletes == {}
    scheduler.tick()
    assert scheduler.answer(QUERY, [MEMORIES[0]], 8).cached_tokens > 50
    scheduler.close()


def test_the_scheduler_thread_survives_a_lost_file(qwen3: HFBackend, tmp_path: Path) -> None:
    scheduler = scheduler_on(qwen3, tmp_path, ram=0)
    use(scheduler, MEMORIES[0], 6)
    scheduler.tick()
    scheduler.close()
    scheduler = scheduler_on(qwen3, tmp_path, ram=0)
    for path in (tmp_path / "kv").glob("*.safetensors"):
        path.unlink()
    scheduler.start(0.01)  # its first tick finds the file gone, when it measures a load
    assert alive_after(scheduler, "m1") and scheduler.failed_ticks == 0
    scheduler.close()


def test_the_scheduler_thread_survives_a_failed_tick(qwen3: HFBackend, tmp_path: Path) -> None:
    """The folder of the scheduler's state is deleted before it writes a snapshot."""
    scheduler = scheduler_on(qwen3, tmp_path / "state")
    scheduler.prefix_selector.probe()
    for _ in range(SNAPSHOT_EVERY):
        scheduler.observations.use([MEMORIES[0]], 5)
    shutil.rmtree(tmp_path / "state")
    scheduler.start(0.01)
    until = time.monotonic() + 60
    while not scheduler.failed_ticks and time.monotonic() < until:
        time.sleep(0.01)
    assert scheduler.failed_ticks and "StorageError: " in scheduler.last_failed_tick
    assert alive_after(scheduler, "m1")
    (tmp_path / "state").mkdir()
    scheduler.close()


def test_an_outage_loses_no_item(qwen3: HFBackend, link: str) -> None:
    scheduler = cold_scheduler(qwen3, link)
    ((item_id, _),) = scheduler.index.stored().values()
    FailingLink.down = True
    answer = scheduler.answer(QUERY, [MEMORIES[0]], 8)
    assert answer.cached_tokens == 0 and answer.token_ids == as_text(qwen3, MEMORIES[0])
    assert "m0 was not loaded: The cold tier" in answer.note and "connection refused" in answer.note
    assert (
        "connection refused" in scheduler.prefix_selector.unreachable["m0"]
        and scheduler.prefix_selector.unreadable == {}
    )
    assert scheduler.index.stored() == {"m0": (item_id, "cold")}
    FailingLink.down = False
    again = scheduler.answer(QUERY, [MEMORIES[0]], 8)
    assert (
        again.cached_tokens > 50 and again.token_ids == answer.token_ids and scheduler.prefix_selector.unreachable == {}
    )
    scheduler.close()


def test_an_outage_during_a_probe_loses_no_item(qwen3: HFBackend, link: str) -> None:
    costs = Costs(0.001, 1e-2, 0.0, kv_bytes_a_token(qwen3))
    scheduler = MemScheduler(memory_on(qwen3), "benefit_per_byte", {"cold": 1 << 30}, costs=costs, cold=link)
    use(scheduler, MEMORIES[0], 6)
    FailingLink.down = True
    assert [move.kind for move in scheduler.tick()] == ["build"]
    assert scheduler.index.tiers() == {"m0": "cold"} and list(scheduler.prefix_selector.unreachable) == ["m0"]
    FailingLink.down = False
    assert scheduler.answer(QUERY, [MEMORIES[0]], 8).cached_tokens > 50
    scheduler.close()


def test_a_newer_build_is_not_dropped_when_the_older_file_is_lost(qwen3: HFBackend, tmp_path: Path) -> None:
    """While a lost file is read, another request drops the item, and it is built again."""
    scheduler = scheduler_on(qwen3, tmp_path, ram=0)
    use(scheduler, MEMORIES[0], 6)
    scheduler.tick()
    ((lost, _),) = scheduler.index.stored().values()
    scheduler.index.evict("m0")
    scheduler.tick()
    ((built, _),) = scheduler.index.stored().values()
    assert built != lost and not scheduler.index.evict("m0", lost)
    assert scheduler.index.stored() == {"m0": (built, "disk")}
    assert scheduler.index.evict("m0", built) and scheduler.index.stored() == {}
    scheduler.close()


def test_an_edit_is_kept_if_the_old_kv_can_not_be_deleted(qwen3: HFBackend, tmp_path: Path, link: str) -> None:
    """The store is down when the text changes. The old KV is used neither then nor after a restart."""
    scheduler = cold_scheduler(qwen3, link, tmp_path / "state")
    edited = TextualMemoryItem(id="m0", memory=MEMORIES[1].memory)
    FailingLink.down = True
    scheduler.update(edited)
    assert scheduler.index.tiers() == {} and len(scheduler.items.pending_deletes) == 1
    answer = scheduler.answer(QUERY, [edited], 8)
    assert answer.cached_tokens == 0 and answer.token_ids == as_text(qwen3, edited)
    scheduler.explain("m0")
    row = scheduler.planner.table.row_of["m0"]
    assert scheduler.planner.table.tokens[row] == len(scheduler.index.tokens(edited).token_ids)
    FailingLink.down = False
    scheduler.items.close()
    assert scheduler.journal is not None
    scheduler.journal.close()  # as a process that was killed

    costs = scheduler.planner.costs
    again = MemScheduler(memory_on(qwen3), "benefit_per_byte", {"cold": 1 << 30}, tmp_path / "state", costs, cold=link)
    assert again.index.texts["m0"].memory == edited.memory
    assert again.index.tiers() == {} and again.items.ids() == [], "what was left is of the old text, and gone now"
    assert list((tmp_path / "cold").iterdir()) == []
    again.close()


def test_an_edit_is_recorded_before_the_store_is_called(qwen3: HFBackend, tmp_path: Path, link: str) -> None:
    """A store may raise an error of an unexpected class."""
    scheduler = cold_scheduler(qwen3, link, tmp_path / "state")
    edited = TextualMemoryItem(id="m0", memory=MEMORIES[1].memory)
    FailingLink.down, FailingLink.error = True, RuntimeError
    with pytest.raises(RuntimeError, match="refused"):
        scheduler.update(edited)
    answer = scheduler.answer(QUERY, [edited], 8)
    assert answer.cached_tokens == 0 and answer.token_ids == as_text(qwen3, edited)
    scheduler.explain("m0")
    row = scheduler.planner.table.row_of["m0"]
    assert scheduler.planner.table.tokens[row] == len(scheduler.index.tokens(edited).token_ids)
    assert b'"kind": "text", "id": "m0"' in (tmp_path / "state" / "events.jsonl").read_bytes().splitlines()[-2]
    scheduler.close()
