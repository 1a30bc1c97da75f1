"""The remote tier `cold`, with fsspec's stores in memory and in a folder."""

from __future__ import annotations

import uuid
from pathlib import Path

import fsspec
import pytest

from kvmem import KVCacheItem
from kvmem.cache.dynamic_cache import nbytes
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import ConfigError, StorageError
from kvmem.tiers.tiered_cache import TieredCache
from tests.helpers.tiny import copy_of, loaded, pairs, same_bits

GB = 1 << 30


@pytest.fixture(scope="module")
def built(qwen3: HFBackend) -> list[KVCacheItem]:
    return [qwen3.build(memory) for memory, _ in pairs(3, 300)]


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{uuid.uuid4()}" if request.param == "memory" else f"file://{tmp_path}/cold"


def test_moves_keep_every_bit_and_the_next_process_restores_them(
    qwen3: HFBackend, built: list[KVCacheItem], url: str
) -> None:
    before = [copy_of(item) for item in built]
    items = TieredCache(qwen3, {"ram": GB, "cold": GB}, cold=url)
    for item in built:
        items.put(item, "ram")
        assert items.move(item.kv_cache_id, "cold")
    assert items.used_bytes() == {"ram": 0, "cold": sum(nbytes(item.kv_cache) for item in built)}
    assert items.move(built[0].kv_cache_id, "ram") and items.drop(built[1].kv_cache_id)
    items.close()

    items = TieredCache(qwen3, {"ram": GB, "cold": GB}, cold=url)
    assert items.ids() == [built[2].kv_cache_id] and items.refused == {}
    with items.use(built[2].kv_cache_id) as found:
        assert same_bits(found, before[2]) and found.metadata == built[2].metadata
    assert items.used_bytes()["cold"] == nbytes(built[2].kv_cache)


def test_damaged_foreign_and_half_written_items_are_refused(
    qwen3: HFBackend, built: list[KVCacheItem], url: str
) -> None:
    items = TieredCache(qwen3, {"cold": GB}, cold=url)
    for item in built:
        items.put(item, "cold")
    store, root = fsspec.core.url_to_fs(url)
    files = sorted(str(name) for name in store.ls(root, detail=False))
    tensors = [name for name in files if name.endswith(".safetensors")]
    data = bytearray(store.cat_file(tensors[0]))
    data[-1] ^= 1
    store.pipe_file(tensors[0], bytes(data))
    store.pipe_file(tensors[1].replace(".safetensors", ".json"), b"{")
    store.rm_file(tensors[2].replace(".safetensors", ".json"))

    items = TieredCache(qwen3, {"cold": GB}, cold=url)
    assert len(items.ids()) == 1 and len(items.refused) == 1
    assert not store.exists(tensors[2]), "half written, and gone"
    with pytest.raises(StorageError, match="checksum"), items.use(items.ids()[0]):
        pass
    other = HFBackend(loaded("tiny", seed=1))
    assert "another model" in str(TieredCache(other, {"cold": GB}, cold=url).refused)


def test_items_over_the_budget_are_deleted_and_a_wrong_url_is_named(
    qwen3: HFBackend, built: list[KVCacheItem], url: str
) -> None:
    TieredCache(qwen3, {"cold": GB}, cold=url).put(built[0], "cold")
    assert "over the tier's 10 bytes" in TieredCache(qwen3, {"cold": 10}, cold=url).refused[built[0].kv_cache_id]
    assert TieredCache(qwen3, {"cold": GB}, cold=url).ids() == []
    with pytest.raises(ConfigError, match="needs a URL"):
        TieredCache(qwen3, {"cold": GB})
    with pytest.raises(StorageError, match="The cold tier nope://x can't be opened"):
        TieredCache(qwen3, {"cold": GB}, cold="nope://x")
