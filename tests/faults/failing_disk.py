"""A command: every writer of memory files on a disk that is full, limited or read-only. Prints what was refused.

`python -m tests.faults.failing_disk FOLDER full|limited|read-only`. FOLDER is a small disk, except for `limited`.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from kvmem import KVCacheItem
from kvmem.errors import StorageError
from kvmem.tiers import TieredCache
from tests.helpers import stored
from tests.helpers.tiny import copy_of, memory_on, pairs, same_bits, tiny_backend

GB = 1 << 30
TIERS = ("disk", "disk_int8", "cold")


def main(folder: Path, fault: str) -> None:
    backend = tiny_backend("qwen3")
    texts = [text for text, _ in pairs(4, 2000)]
    small = memory_on(backend).extract(texts[0][:300])
    large = [memory_on(backend).extract(text) for text in texts]
    before = copy_of(small)
    memories = {suffix: memory_on(backend, memory_filename=f"memory.{suffix}") for suffix in ("safetensors", "pickle")}
    for memory in memories.values():
        memory.add(small)
        memory.dump(folder)
    tiers = open_tiers(folder)
    for tier in TIERS:
        tiers.put(_copy(small), tier)
    if fault == "read-only":  # a disk does not become read-only while a file on it is open for writing, as a lock is
        tiers.close()
    files = _contents(folder)

    undo = FAULTS[fault](folder)
    for suffix, memory in memories.items():
        memory.add(large)
        refused(suffix, folder / f"memory.{suffix}", lambda memory=memory: memory.dump(folder))
        assert len(memory.get_all()) == 1 + len(large), "the memory in place stays"
    copies = [_copy(large[0]) for _ in TIERS]
    if fault == "read-only":
        refused("tiers", folder / "tiers", lambda: open_tiers(folder))
    else:
        for tier, item in zip(TIERS, copies, strict=True):
            used = tiers.used_bytes()
            tiers.put(item, "ram")
            # The cold tier writes to the folder for temporary files first, which is limited too.
            named = Path("item.safetensors") if (tier, fault) == ("cold", "limited") else folder
            refused(tier, named, lambda tier=tier, item=item: tiers.move(item.kv_cache_id, tier))
            assert tiers.tier_of(item.kv_cache_id) == "ram" and tiers.used_bytes()[tier] == used[tier]
    assert _contents(folder) == files, "what was on the disk stays, and nothing of what failed"
    for suffix in memories:
        again = memory_on(backend, memory_filename=f"memory.{suffix}")
        assert again.load(folder) == 1 and stored.same_tensors(again.get_all()[0].kv_cache, small.kv_cache)
    assert same_bits(small, before)

    undo()
    if fault == "read-only":
        tiers = open_tiers(folder)
        for item in copies:
            tiers.put(item, "ram")
    for memory in memories.values():
        memory.dump(folder)
        assert memory.load(folder) == 1 + len(large)
    for tier, item in zip(TIERS, copies, strict=True):
        assert tiers.move(item.kv_cache_id, tier)
    assert len(tiers.ids()) == 2 * len(TIERS)
    for item_id in tiers.ids():
        was = large[0] if item_id in {item.kv_cache_id for item in copies} else small
        with tiers.use(item_id) as used_item:
            assert used_item.metadata.lossy or stored.same_tensors(used_item.kv_cache, was.kv_cache)
    tiers.close()


def open_tiers(folder: Path) -> TieredCache:
    budgets = {"ram": GB, **dict.fromkeys(TIERS, GB)}
    return TieredCache(tiny_backend("qwen3"), budgets, folder / "tiers", f"file://{folder}/cold")


def refused(what: str, path: Path, use: Callable[[], object]) -> None:
    try:
        use()
    except StorageError as error:
        assert str(path) in str(error), f"{what}: {error}"
        print(f"{what} refused")
    else:
        raise AssertionError(f"{what} was written")


def fill(folder: Path) -> Callable[[], None]:
    """Fills the disk but for a few kB."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            os.truncate(filler, max(filler.stat().st_size - 8192, 0))
    return filler.unlink


def limit(folder: Path) -> Callable[[], None]:
    """Limits the size of a file, as a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def forbid_writing(folder: Path) -> Callable[[], None]:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    return lambda: subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True) and None


FAULTS: dict[str, Callable[[Path], Callable[[], None]]] = {"full": fill, "limited": limit, "read-only": forbid_writing}


def _contents(folder: Path) -> dict[str, bytes]:
    """The files in the folder and below, without those that only hold a lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock" and path.name != "filler")
    return {str(path): path.read_bytes() for path in files if path.name != ".lock"}


def _copy(item: KVCacheItem) -> KVCacheItem:
    """The same memory under an id of its own."""
    return KVCacheItem(item.kv_cache, item.metadata)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
