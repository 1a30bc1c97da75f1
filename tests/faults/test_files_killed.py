"""A process that is killed while it writes: the file is the old one or the new one, and the next writer cleans up."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from kvmem.tiers import TieredCache
from tests.helpers import stored
from tests.helpers.forking import mother
from tests.helpers.tiny import memory_on, pairs, tiny_backend

KILLS = 6
"""Of each kind, at random instants."""
TOKENS = 30_000
"""Of an item of 15 MB, whose dump takes some 50 ms."""

DUMP = """
from pathlib import Path
from tests.helpers import stored
path, turn = Path(sys.argv[1]), 0
items = [stored.item(name, tokens={tokens}, seed=seed) for seed, name in enumerate("ab")]
"""
DUMP_ONE = "stored.dump(path, items[turn]); turn = 1 - turn"


@pytest.mark.parametrize("suffix", ["safetensors", "pickle"])
def test_killed_at_random_instants_of_a_dump(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"memory.{suffix}"
    items = [stored.item(name, tokens=TOKENS, seed=seed) for seed, name in enumerate("ab")]
    stored.dump(path, items[0])
    chance = random.Random(0)
    interrupted = 0
    with mother(DUMP.format(tokens=TOKENS), DUMP_ONE, str(path)) as writers:
        for _ in range(KILLS):
            child = writers.start()
            time.sleep(chance.uniform(0, 0.3))
            writers.kill(child)
            interrupted += bool(list(tmp_path.glob(".*.partial")))
            (loaded,) = stored.load(path)
            assert stored.same_tensors(loaded.kv_cache, items["ab".index(loaded.kv_cache_id)].kv_cache)
    stored.dump(path, items[0])
    assert not list(tmp_path.glob(".*.partial")), f"what {interrupted} killed dumps left is removed"
    assert stored.same_tensors(stored.load(path)[0].kv_cache, items[0].kv_cache)


TIER = """
from kvmem.tiers import TieredCache
from tests.helpers.tiny import memory_on, pairs, tiny_backend
backend = tiny_backend("qwen3")
built = memory_on(backend).extract(pairs(1, 600)[0][0])
from kvmem import KVCacheItem
class Tiers:
    def __init__(self):
        self.tiers = None
    def work(self):
        if self.tiers is None:
            self.tiers = TieredCache(backend, {"ram": 1 << 30, "disk": 1 << 30, "disk_int8": 1 << 30}, sys.argv[1])
        item = KVCacheItem(built.kv_cache, built.metadata)
        self.tiers.put(item, "ram")
        for tier in ("disk", "disk_int8", "ram"):
            self.tiers.move(item.kv_cache_id, tier)
        self.tiers.move(item.kv_cache_id, "disk")
        ids = self.tiers.ids()
        if len(ids) > 5:
            self.tiers.drop(ids[0])
owner = Tiers()
"""


def test_killed_at_random_instants_of_moves_between_tiers(tmp_path: Path) -> None:
    """The next process restores whole items only, and none is in two tiers."""
    backend = tiny_backend("qwen3")
    built = memory_on(backend).extract(pairs(1, 600)[0][0])
    budgets = {"disk": 1 << 30, "disk_int8": 1 << 30}
    chance, restored = random.Random(1), 0
    with mother(TIER, "owner.work()", str(tmp_path)) as writers:
        for _ in range(KILLS):
            child = writers.start()
            time.sleep(chance.uniform(0.05, 0.5))
            writers.kill(child)
            tiers = TieredCache(backend, budgets, tmp_path)
            assert all("in a faster tier too" in reason for reason in tiers.refused.values())
            for item_id in tiers.ids():
                with tiers.use(item_id) as used:
                    lossy = used.metadata.lossy
                    assert lossy or stored.same_tensors(used.kv_cache, built.kv_cache)
                restored += 1
            tiers.close()
            assert not list(tmp_path.rglob(".*.partial"))
    assert restored
