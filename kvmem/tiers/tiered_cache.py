"""Items in several tiers behind one mapping, with a byte budget for each tier. A lossless move keeps every bit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from kvmem.cache import KVCacheItem, KVCacheMetadata, device_transfer, dynamic_cache
from kvmem.engines import Backend, FileHandle
from kvmem.engines.vllm import VLLMBackend
from kvmem.errors import BudgetError, ConfigError, DuplicateMemoryError, StorageError, UnknownMemoryError, did_you_mean
from kvmem.tiers.base import DiskStore, MemoryStore, PendingDeletes, RefusedFile, TierStore
from kvmem.tiers.engine_files import LEVELS, EngineFiles
from kvmem.tiers.load_times import LoadTimes
from kvmem.tiers.quantized import BITS, QuantizedStore
from kvmem.tiers.remote import RemoteStore


@dataclass
class _Entry:
    tier: str
    nbytes: int
    """Bytes of its keys and values in that tier."""
    built_bytes: int
    """Bytes of its keys and values as built."""
    metadata: KVCacheMetadata
    ref_count: int = 0
    moving: bool = False
    dropped: bool = False
    """Dropped while in use or moving: hidden, and freed after the last use or the end of the move."""
    erased: bool = False
    """Dropped, and its bytes are deleted from the store already."""


@dataclass(frozen=True)
class _Orphan:
    store: DiskStore | RemoteStore
    file: RefusedFile
    found_at: float
    """By the monotonic clock."""


ORPHANS_AFTER_S = 24 * 3600.0
"""A file of an earlier process that can't be used is deleted so many seconds after the tiers were opened."""


class TieredCache:
    """Maps ids to items, in whichever tier their bytes are. Thread-safe.

    budgets: bytes by tier, fastest first: `gpu` (the model's), `ram` (host memory, pinned if the model is on a GPU),
    `disk` (in `folder`) and `cold` (at the URL `cold`). Disk and cold tiers belong to one process at a time. Budgets
    count the bytes of keys and values and are never exceeded: a move reserves its bytes in the new tier before it
    copies, and frees the old ones after. An item in use is neither moved nor freed.

    `disk_int8` and `disk_int4` (also in `folder`) are lossy. The metadata of an item that was there is marked `lossy`
    in every tier from then on, and so is every cache and answer that uses it.
    """

    NAMES: ClassVar[tuple[str, ...]] = ("gpu", "ram", "disk", "cold", *(f"disk_{scheme}" for scheme in BITS))

    def __init__(
        self,
        backend: Backend,
        budgets: Mapping[str, int],
        folder: str | Path | None = None,
        cold: str | None = None,
        orphans_after_s: float = ORPHANS_AFTER_S,
    ) -> None:
        """Restores the items that an earlier process left on disk and in the cold tier.

        orphans_after_s: see `collect_orphans`.

        Raises ConfigError if a tier is unknown or unavailable.
        """
        self.budgets = dict(budgets)
        self.refused: dict[str, str] = {}
        """Why an item of an earlier process was not restored, by file name or item id."""
        self.pending_deletes = PendingDeletes()
        self.loads = LoadTimes()
        """Seconds of loads by tier. Host memory is not measured: its copies to a GPU overlap with the forward pass."""
        self.writes = LoadTimes()
        """Seconds of writes by tier, of the same tiers."""
        self._backend = backend
        self._entries: dict[str, _Entry] = {}
        self._orphans: dict[tuple[str, str], _Orphan] = {}
        """By tier and file name."""
        self._orphans_after_s = orphans_after_s
        self._incoming: set[str] = set()
        self._used = dict.fromkeys(self.budgets, 0)
        self._lock = threading.Lock()
        self._stores = {name: self._open(name, folder, cold) for name in self.budgets}
        self.measured_tiers = {name for name, store in self._stores.items() if store.is_measured}
        """The tiers whose loads `loads` measures."""
        self.lasting_tiers = {name for name, store in self._stores.items() if not isinstance(store, MemoryStore)}
        """The tiers whose items the next process finds."""

    def _open(self, name: str, folder: str | Path | None, cold: str | None) -> TierStore:
        on_gpu = self._backend.device.type == "cuda"
        if name not in self.NAMES:
            raise ConfigError(f"Unknown tier {name!r}. {did_you_mean(name, self.NAMES)}")
        if isinstance(self._backend, VLLMBackend):
            if name not in LEVELS or folder is None:
                raise ConfigError(f"With vLLM the tiers are {', '.join(LEVELS)}, in a folder, and not {name!r}.")
            return self._restore(name, EngineFiles(self._backend, Path(folder), name))
        if name == "ram":
            return MemoryStore(self._backend, torch.device("cpu"), pinned=on_gpu)
        if name == "gpu":
            if not on_gpu:
                raise ConfigError("The tier 'gpu' needs a model on a GPU, and this one is on a CPU. Use 'ram'.")
            return MemoryStore(self._backend, self._backend.device, pinned=False)
        if name == "cold":
            if cold is None:
                raise ConfigError("The tier 'cold' needs a URL. Give one as `cold`, or leave the tier out.")
            return self._restore(name, RemoteStore(self._backend, cold))
        if folder is None:
            raise ConfigError(f"The tier {name!r} needs a folder. Give one, or leave the tier out.")
        scheme = name.removeprefix("disk_")
        if scheme in BITS:
            return self._restore(name, QuantizedStore(self._backend, Path(folder) / scheme, scheme))
        return self._restore(name, DiskStore(self._backend, Path(folder)))

    def _restore(self, name: str, store: DiskStore | RemoteStore) -> TierStore:
        """Registers the items that an earlier process left in `store`, and deletes those that are not usable."""
        items, refused = store.scan()
        for file in refused:
            self.refused[file.name] = file.reason
            self._orphans[name, file.name] = _Orphan(store, file, time.monotonic())
        for item in items:
            duplicate = item.item_id in self._entries
            nbytes = store.nbytes(item.metadata.token_count, item.nbytes)
            if duplicate or self._used[name] + nbytes > self.budgets[name]:
                reason = "in a faster tier too" if duplicate else f"over the tier's {self.budgets[name]} bytes"
                self.refused[item.item_id] = f"{reason}; deleted"
                self.pending_deletes.delete(store, name, item.item_id, nbytes, item.metadata)
                continue
            self._entries[item.item_id] = _Entry(name, nbytes, item.nbytes, item.metadata)
            self._used[name] += nbytes
        return store

    def put(self, item: KVCacheItem, tier: str) -> None:
        """Copies a new item into `tier`. Raises BudgetError if it does not fit, DuplicateMemoryError for a known id."""
        item_id, built_bytes = item.kv_cache_id, dynamic_cache.nbytes(item.kv_cache)
        nbytes = self._size(tier, item.metadata.token_count, built_bytes)
        with self._lock:
            if item_id in self._entries or item_id in self._incoming:
                raise DuplicateMemoryError(f"The id {item_id} is already in the tiers. Drop it first.")
            self._reserve(item_id, tier, nbytes)
            self._incoming.add(item_id)
        stored = False
        try:
            self._write(item, tier, nbytes)
            stored = True
        finally:
            with self._lock:
                self._incoming.remove(item_id)
                if stored:
                    self._entries[item_id] = _Entry(
                        tier, nbytes, built_bytes, self._stores[tier].stored_metadata(item.metadata)
                    )
                else:
                    self._used[tier] -= nbytes

    @contextmanager
    def use(self, item_id: str) -> Iterator[KVCacheItem]:
        """The item on the model's device; it is neither moved nor freed inside the block. Raises UnknownMemoryError.

        From another tier the bytes are mapped or copied for this use, and do not count in a budget. From host memory to
        a GPU they are copied layer by layer, overlapped with the forward pass of a view of the item.
        """
        with self._lock:
            entry = self._entry(item_id)
            entry.ref_count += 1
            tier = entry.tier
        try:
            try:
                item = self._read(item_id, tier, entry.nbytes)
            except (KeyError, StorageError) as error:
                if entry.erased:
                    raise UnknownMemoryError(f"Not in the tiers any more: {item_id}.") from error
                raise
            cache = device_transfer.to_device(item.kv_cache, self._backend.device, self._backend.model_config)
            yield KVCacheItem(cache, item.metadata, item.kv_cache_id)
        finally:
            with self._lock:
                entry.ref_count -= 1
                self._free_if_dropped(item_id, entry)

    @contextmanager
    def file(self, item_id: str) -> Iterator[FileHandle]:
        """As `use`, for an engine that injects files: the item's file. Raises StorageError if it can't be read."""
        with self._lock:
            entry = self._entry(item_id)
            entry.ref_count += 1
            store = self._stores[entry.tier]
        try:
            assert isinstance(store, EngineFiles)
            yield store.handle(item_id, entry.metadata)
        finally:
            with self._lock:
                entry.ref_count -= 1
                self._free_if_dropped(item_id, entry)

    def move(self, item_id: str, tier: str) -> bool:
        """Copies the item to `tier` and frees its bytes in the old tier.

        Returns False and changes nothing if the item is in use or moving, or if it was used or dropped during the copy.
        Raises BudgetError if it does not fit, and UnknownMemoryError.
        """
        with self._lock:
            entry = self._entry(item_id)
            if entry.ref_count or entry.moving:
                return False
            if entry.tier == tier:
                return True
            nbytes = self._size(tier, entry.metadata.token_count, entry.built_bytes)
            self._reserve(item_id, tier, nbytes)
            entry.moving = True
        source, target, copied = entry.tier, self._stores[tier], False
        try:
            self._write(self._read(item_id, source, entry.nbytes), tier, nbytes)
            copied = True
        finally:
            with self._lock:
                entry.moving = False
                moved = copied and not entry.ref_count and not entry.dropped
                if moved:
                    entry.metadata = target.stored_metadata(entry.metadata)
                    entry.tier, tier = tier, entry.tier  # the old tier is freed below
                    entry.nbytes, nbytes = nbytes, entry.nbytes
                self._used[tier] -= nbytes
                if copied:
                    self.pending_deletes.delete(self._stores[tier], tier, item_id, nbytes, entry.metadata)
                self._free_if_dropped(item_id, entry)
        return moved

    def drop(self, item_id: str) -> bool:
        """Removes the item. It is hidden immediately, and its bytes are freed after its last use.

        Returns False if there is no such item.
        """
        with self._lock:
            entry = self._entries.get(item_id)
            if entry is None or entry.dropped:
                return False
            entry.dropped = True
            self._free_if_dropped(item_id, entry)
        return True

    def erase(self, item_id: str) -> None:
        """Removes the item, if there is one, and deletes its bytes at once: an open view keeps its tensors until it
        ends, and they count in the budget until then."""
        with self._lock:
            entry = self._entries.get(item_id)
            if entry is not None:
                self._erase(item_id, entry)

    def erase_memories(self, is_meant: Callable[[str], bool]) -> list[str]:
        """Erases all items of some text memories and groups, and everything else that may hold their text.

        is_meant: whether the id of a text memory or a group is meant. Items that were dropped before and are in use, or
        could not be deleted, are erased too. So are the files of an earlier process that can't be used: those that
        state the id, and those whose manifest can't be read. Returns what could not be deleted now, and why.
        """
        with self._lock:
            for item_id, entry in list(self._entries.items()):
                if _is_of(entry.metadata, is_meant):
                    self._erase(item_id, entry)
        left = []
        for (tier, item_id), pending in list(self.pending_deletes.items()):
            if _is_of(pending.metadata, is_meant) and not self.pending_deletes.delete(
                pending.store, tier, item_id, pending.nbytes, pending.metadata
            ):
                left.append(f"in {tier}: {self.pending_deletes[tier, item_id].reason}")
        for key, orphan in list(self._orphans.items()):
            ids = orphan.file.ids
            if orphan.file.is_of_a_store if ids is None else any(map(is_meant, ids)):
                left += self._delete_orphan(key, orphan)
        return left

    def collect_orphans(self) -> None:
        """Deletes the files of earlier processes that can't be used, `orphans_after_s` after they were found.

        The time is that of the monotonic clock, so a clock of the day that jumps deletes nothing early. Files that can
        be used are items, see `ids`; unfinished files of a killed process are deleted when the tiers are opened.
        """
        for key, orphan in list(self._orphans.items()):
            if orphan.file.is_of_a_store and time.monotonic() - orphan.found_at >= self._orphans_after_s:
                self._delete_orphan(key, orphan)

    def _delete_orphan(self, key: tuple[str, str], orphan: _Orphan) -> list[str]:
        """Returns why the file could not be deleted, if so."""
        try:
            orphan.store.delete_refused(orphan.file.name)
        except (StorageError, OSError) as error:
            return [f"in {key[0]}: {orphan.file.name}: {error}"]
        self._orphans.pop(key, None)
        self.refused.pop(orphan.file.name, None)
        return []

    def _erase(self, item_id: str, entry: _Entry) -> None:
        entry.dropped = True
        if not entry.moving and not entry.erased:
            entry.erased = True
            self._delete_bytes(item_id, entry)
        self._free_if_dropped(item_id, entry)

    def _delete_bytes(self, item_id: str, entry: _Entry) -> None:
        self.pending_deletes.delete(self._stores[entry.tier], entry.tier, item_id, entry.nbytes, entry.metadata)

    def ids(self) -> list[str]:
        """The ids of all items, in every tier."""
        with self._lock:
            return [item_id for item_id, entry in self._entries.items() if not entry.dropped]

    def tier_of(self, item_id: str) -> str:
        """The tier that holds the item. Raises UnknownMemoryError."""
        with self._lock:
            return self._entry(item_id).tier

    def metadata(self, item_id: str) -> KVCacheMetadata:
        """The item's metadata, without loading its tensors. Raises UnknownMemoryError."""
        with self._lock:
            return self._entry(item_id).metadata

    def used_bytes(self) -> dict[str, int]:
        """Reserved bytes by tier: items there, dropped but in use, moving there, or not deleted yet."""
        with self._lock:
            pending = self.pending_deletes.by_tier()
            return {tier: used + pending[tier] for tier, used in self._used.items()}

    def close(self) -> None:
        """Releases the disk tiers for the next process."""
        for store in self._stores.values():
            store.close()

    def nbytes(self, item_id: str) -> int:
        """Bytes of the item's keys and values in its tier. Raises UnknownMemoryError."""
        with self._lock:
            return self._entry(item_id).nbytes

    def size(self, tier: str, tokens: int) -> int:
        """Bytes of a memory of `tokens` in a tier, for a model without a sliding window."""
        return self._size(tier, tokens, self._backend.fingerprint.kv_bytes(tokens))

    def _size(self, tier: str, tokens: int, built_bytes: int) -> int:
        if tier not in self.budgets:
            raise ConfigError(f"Unknown tier {tier!r}. {did_you_mean(tier, self.budgets)}")
        return self._stores[tier].nbytes(tokens, built_bytes)

    def _read(self, item_id: str, tier: str, nbytes: int) -> KVCacheItem:
        started = time.perf_counter()
        item = self._stores[tier].read(item_id)
        if tier in self.measured_tiers:
            if self._backend.device.type == "cuda":  # copies and kernels are asynchronous
                torch.cuda.synchronize(self._backend.device)
            self.loads.record(tier, nbytes, time.perf_counter() - started)
        return item

    def _write(self, item: KVCacheItem, tier: str, nbytes: int) -> None:
        started = time.perf_counter()
        self._stores[tier].put(item)
        if tier in self.measured_tiers:
            self.writes.record(tier, nbytes, time.perf_counter() - started)

    def write_s(self, tier: str, nbytes: int) -> float:
        """Seconds that writing `nbytes` to the tier takes, as measured; 0 for one that was never written to."""
        return self.writes.expected_s(tier, nbytes) or 0.0

    def _entry(self, item_id: str) -> _Entry:
        entry = self._entries.get(item_id)
        if entry is None or entry.dropped:
            raise UnknownMemoryError(f"Not in the tiers: {item_id}. There are {len(self._entries)} items, see ids().")
        return entry

    def _reserve(self, item_id: str, tier: str, nbytes: int) -> None:
        self.pending_deletes.check_deleted(tier, item_id)
        if nbytes > (free := self.budgets[tier] - self._used[tier] - self.pending_deletes.by_tier()[tier]):
            raise BudgetError(
                f"Item {item_id} has {nbytes} bytes, and the tier {tier!r} has {free} left. Drop or demote others."
            )
        self._used[tier] += nbytes

    def _free_if_dropped(self, item_id: str, entry: _Entry) -> None:
        if entry.dropped and not entry.ref_count and not entry.moving and self._entries.get(item_id) is entry:
            del self._entries[item_id]
            self._used[entry.tier] -= entry.nbytes
            if not entry.erased:
                self._delete_bytes(item_id, entry)


def _is_of(metadata: KVCacheMetadata, is_meant: Callable[[str], bool]) -> bool:
    return metadata.textual_memory is not None and is_meant(metadata.textual_memory.id)
