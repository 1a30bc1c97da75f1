"""Bytes that could not be deleted: they are recorded, count in their tier's budget, and are deleted by a retry."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from kvmem import TextualMemoryItem
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import BudgetError, StorageError
from kvmem.scheduler.cost_model import Costs, kv_bytes_a_token
from kvmem.scheduler.scheduler import MemScheduler
from kvmem.tiers.base import DiskStore
from kvmem.tiers.tiered_cache import TieredCache
from tests.helpers.tiny import memory_on
from tests.scheduler.test_scheduler import MEMORIES, use
from tests.tiers.conftest import FailingLink


def test_a_drop_succeeds_while_the_store_is_down(qwen3: HFBackend, link: str) -> None:
    items = TieredCache(qwen3, {"ram": 1 << 30, "cold": 1 << 30}, cold=link)
    first, second = (qwen3.build(memory.memory) for memory in MEMORIES[:2])
    for item in (first, second):
        items.put(item, "cold")
    FailingLink.down = True
    assert items.drop(first.kv_cache_id) and items.ids() == [second.kv_cache_id]
    assert list(items.pending_deletes) == [("cold", first.kv_cache_id)]
    assert "connection refused" in items.pending_deletes["cold", first.kv_cache_id].reason
    assert items.used_bytes() == {"ram": 0, "cold": items.nbytes(second.kv_cache_id) + first.metadata.kv_bytes}
    with pytest.raises(
        StorageError,
        match=r"The former KV of .* in the tier 'cold' is not deleted yet .*refused.* pending_deletes\.retry",
    ):
        items.put(first, "cold")  # the removal that is still to come would take it
    FailingLink.down = False
    items.pending_deletes.retry()
    assert items.pending_deletes == {} and items.used_bytes() == {"ram": 0, "cold": items.nbytes(second.kv_cache_id)}
    items.put(first, "cold")
    items.pending_deletes.retry()
    with items.use(first.kv_cache_id) as item:
        assert item.metadata == first.metadata, "what is new there stays"


def test_a_retry_sends_one_request_to_a_store_that_is_down(qwen3: HFBackend, link: str) -> None:
    """A request may take as long as the store takes to fail. The item that failed is the last in the next retry."""
    items = TieredCache(qwen3, {"cold": 1 << 30}, cold=link)
    for memory in MEMORIES[:3]:
        items.put(qwen3.build(memory.memory), "cold")
    FailingLink.down = True
    for item_id in items.ids():
        items.drop(item_id)
    first, second, third = items.pending_deletes
    requests = FailingLink.requests
    items.pending_deletes.retry()
    assert FailingLink.requests == requests + 1 and list(items.pending_deletes) == [second, third, first]


def test_a_file_that_can_not_be_deleted_counts_in_the_budget(qwen3: HFBackend, tmp_path: Path) -> None:
    """In a tier for one item, none fits until the old bytes are deleted. A folder in its place prevents that."""
    first, second = (qwen3.build(memory.memory) for memory in MEMORIES[:2])
    budget = max(first.metadata.kv_bytes, second.metadata.kv_bytes)
    items = TieredCache(qwen3, {"disk": budget}, tmp_path)
    items.put(first, "disk")
    path = DiskStore.file_of(tmp_path, first.kv_cache_id)
    path.unlink()
    path.mkdir()  # which no unlink removes
    assert items.drop(first.kv_cache_id) and items.ids() == []
    assert items.used_bytes() == {"disk": first.metadata.kv_bytes}
    with pytest.raises(BudgetError, match=f"has {budget - first.metadata.kv_bytes} left"):
        items.put(second, "disk")
    items.pending_deletes.retry()
    assert list(items.pending_deletes) == [("disk", first.kv_cache_id)]
    path.rmdir()
    path.touch()
    items.pending_deletes.retry()
    assert items.used_bytes() == {"disk": 0} and not path.exists()
    items.put(second, "disk")
    items.close()


def test_a_tick_retries_deletes_and_plans_with_the_free_bytes(qwen3: HFBackend, tmp_path: Path, link: str) -> None:
    """The tier holds two items: while the KV of the old text can't be deleted, one item less is planned there."""
    costs = Costs(0.001, 1e-2, 0.0, kv_bytes_a_token(qwen3), {"cold": 1e-12})
    one = qwen3.build(MEMORIES[0].memory).metadata.kv_bytes
    scheduler = MemScheduler(memory_on(qwen3), "lfu", {"cold": 2 * one + one // 2}, costs=costs, cold=link)
    use(scheduler, MEMORIES[0], 9)
    use(scheduler, MEMORIES[1], 6)
    assert [scheduler.tick()[0].memory_id for _ in range(2)] == ["m0", "m1"]
    FailingLink.down = True
    scheduler.update(TextualMemoryItem(id="m1", memory=MEMORIES[2].memory))
    ((tier, item_id),) = scheduler.items.pending_deletes
    left = scheduler.items.pending_deletes[tier, item_id]
    assert scheduler.tick() == [] and scheduler.index.tiers() == {"m0": "cold"} and not scheduler.failures
    assert f"; {left.nbytes} bytes of former KV are still in cold: " in scheduler.explain("m1")
    assert "refused" in scheduler.explain("m1") and "former KV" not in scheduler.explain("m0")
    FailingLink.down = False
    assert [move.memory_id for move in scheduler.tick()] == ["m1"] and scheduler.items.pending_deletes == {}
    assert "former KV" not in scheduler.explain("m1") and len(list((tmp_path / "cold").iterdir())) == 4
    scheduler.close()


def test_bytes_that_a_move_could_not_delete_are_recorded(qwen3: HFBackend, tmp_path: Path, link: str) -> None:
    """The store goes down between reading and deleting the file."""

    class DownOnceRead(FailingLink):
        protocol = "downonceread"
        down = False

        def get_file(self, rpath: str, lpath: str, **more: object) -> None:
            super().get_file(rpath, lpath, **more)
            type(self).down = True

    fsspec.register_implementation("downonceread", DownOnceRead, clobber=True)
    items = TieredCache(qwen3, {"ram": 1 << 30, "cold": 1 << 30}, cold=f"downonceread://{tmp_path}/cold")
    item = qwen3.build(MEMORIES[0].memory)
    items.put(item, "cold")
    assert items.move(item.kv_cache_id, "ram") and items.tier_of(item.kv_cache_id) == "ram"
    assert items.used_bytes() == {"ram": items.nbytes(item.kv_cache_id), "cold": item.metadata.kv_bytes}
    assert list(items.pending_deletes) == [("cold", item.kv_cache_id)]
    with pytest.raises(StorageError, match="not deleted yet"):
        items.move(item.kv_cache_id, "cold")
    DownOnceRead.down = False
    items.pending_deletes.retry()
    assert items.used_bytes() == {"ram": items.nbytes(item.kv_cache_id), "cold": 0}
    assert list((tmp_path / "cold").iterdir()) == []
