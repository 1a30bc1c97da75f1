"""Items in tiers (GPU, host memory, disk) behind one mapping, with a byte budget each. A move keeps every bit."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from kvmem.cache import KVCacheItem, KVCacheMetadata, device_transfer, dynamic_cache
from kvmem.engines import Backend
from kvmem.errors import BudgetError, ConfigError, DuplicateMemoryError, UnknownMemoryError, did_you_mean
from kvmem.tiers.base import DiskStore, MemoryStore, PendingDeletes, TierStore
from kvmem.tiers.load_times import LoadTimes
from kvmem.tiers.quantized import BITS, QuantizedStore
from kvmem.tiers.remote import RemoteStore


@dataclass
class _Entry:
    tier: str
    nbytes: int
    """Where it is."""
    built_bytes: int
    metadata: KVCacheMetadata
    leases: int = 0
    moving: bool = False
    gone: bool = False
    """Dropped while in use or on its way: hidden, and freed with the last lease or the end of the move."""


class TieredCache:
    """id -> item, wherever its bytes are. Budgets count keys and values, to the byte, and hold at every moment.

    budgets: bytes by tier, fastest first: `gpu` (where the model is), `ram` (host memory, pinned where the model is on
    a GPU), `disk` (in `folder`) and `cold` (at the URL `cold`), both one process at a time. A move has its place in the
    new tier booked before a byte is copied, and its old place freed after. An item in use is neither moved nor freed.
    `disk_int8` and `disk_int4` (in `folder` too) lose: the metadata of what was there is `lossy` from then on, wherever
    it goes, and so is every cache and answer that it has a part in. Safe from several threads.
    """

    NAMES: ClassVar[tuple[str, ...]] = ("gpu", "ram", "disk", "cold", *(f"disk_{scheme}" for scheme in BITS))

    def __init__(
        self, backend: Backend, budgets: Mapping[str, int], folder: str | Path | None = None, cold: str | None = None
    ) -> None:
        """Takes up what an earlier process left on disk and in the cold tier. ConfigError: a tier is not to be had."""
        self.budgets = dict(budgets)
        self.refused: dict[str, str] = {}
        """What an earlier process left and was not taken up, by the file's name or the item's id, with the reason."""
        self.pending_deletes = PendingDeletes()
        self.loads = LoadTimes()
        """What loads from each tier took. Host memory's bytes reach a GPU behind the forward pass, and do not count."""
        self._backend = backend
        self._entries: dict[str, _Entry] = {}
        self._coming: set[str] = set()
        self._used = dict.fromkeys(self.budgets, 0)
        self._lock = threading.Lock()
        self._places = {name: self._open(name, folder, cold) for name in self.budgets}
        self.measured_tiers = {name for name, place in self._places.items() if not isinstance(place, MemoryStore)}
        """The tiers whose loads are measured in `loads`."""

    def _open(self, name: str, folder: str | Path | None, cold: str | None) -> TierStore:
        on_gpu = self._backend.device.type == "cuda"
        if name not in self.NAMES:
            raise ConfigError(f"Unknown tier {name!r}. {did_you_mean(name, self.NAMES)}")
        if name == "ram":
            return MemoryStore(self._backend, torch.device("cpu"), pinned=on_gpu)
        if name == "gpu":
            if not on_gpu:
                raise ConfigError("The tier 'gpu' needs a model on a GPU, and this one is on a CPU. Use 'ram'.")
            return MemoryStore(self._backend, self._backend.device, pinned=False)
        if name == "cold":
            if cold is None:
                raise ConfigError("The tier 'cold' needs a URL. Give one as `cold`, or leave the tier out.")
            return self._take_up(name, RemoteStore(self._backend, cold))
        if folder is None:
            raise ConfigError(f"The tier {name!r} needs a folder. Give one, or leave the tier out.")
        scheme = name.removeprefix("disk_")
        place = QuantizedStore(self._backend, Path(folder) / scheme, scheme) if scheme in BITS else None
        return self._take_up(name, place or DiskStore(self._backend, Path(folder)))

    def _take_up(self, name: str, place: DiskStore | RemoteStore) -> TierStore:
        found, refused = place.found()
        self.refused |= refused
        for item in found:
            twice = item.item_id in self._entries
            nbytes = place.nbytes(item.metadata.token_count, item.nbytes)
            if twice or self._used[name] + nbytes > self.budgets[name]:
                why = "in a faster tier too" if twice else f"over the tier's {self.budgets[name]} bytes"
                self.refused[item.item_id] = f"{why}; deleted"
                self.pending_deletes.drop(place, name, item.item_id, nbytes, item.metadata)
                continue
            self._entries[item.item_id] = _Entry(name, nbytes, item.nbytes, item.metadata)
            self._used[name] += nbytes
        return place

    def put(self, item: KVCacheItem, tier: str) -> None:
        """Copies a new item into `tier`. Raises BudgetError if it does not fit, DuplicateMemoryError for a known id."""
        item_id, built_bytes = item.kv_cache_id, dynamic_cache.nbytes(item.kv_cache)
        nbytes = self._size(tier, item.metadata.token_count, built_bytes)
        with self._lock:
            if item_id in self._entries or item_id in self._coming:
                raise DuplicateMemoryError(f"The id {item_id} is already in the tiers. Drop it first.")
            self._book(item_id, tier, nbytes)
            self._coming.add(item_id)
        stored = False
        try:
            self._places[tier].take(item)
            stored = True
        finally:
            with self._lock:
                self._coming.remove(item_id)
                if stored:
                    self._entries[item_id] = _Entry(tier, nbytes, built_bytes, self._places[tier].marked(item.metadata))
                else:
                    self._used[tier] -= nbytes

    @contextmanager
    def use(self, item_id: str) -> Iterator[KVCacheItem]:
        """The item, where the model can use it; neither moved nor freed inside the block. Raises UnknownMemoryError.

        From a tier that is not the model's, the bytes are mapped or copied for this use, beside the budgets; from host
        memory to a GPU layer by layer, behind the forward pass of a cache that is lent from it.
        """
        with self._lock:
            entry = self._entry(item_id)
            entry.leases += 1
            tier = entry.tier
        try:
            item = self._read(item_id, tier, entry.nbytes)
            cache = device_transfer.to_device(item.kv_cache, self._backend.device, self._backend.model_config)
            yield KVCacheItem(cache, item.metadata, item.kv_cache_id)
        finally:
            with self._lock:
                entry.leases -= 1
                self._free_if_gone(item_id, entry)

    def move(self, item_id: str, tier: str) -> bool:
        """Copies the bytes to `tier` and frees them where they were. False, and nothing changed, where the item is in
        use or on its way, or was put to use or dropped meanwhile. Raises BudgetError if it does not fit there."""
        with self._lock:
            entry = self._entry(item_id)
            if entry.leases or entry.moving:
                return False
            if entry.tier == tier:
                return True
            nbytes = self._size(tier, entry.metadata.token_count, entry.built_bytes)
            self._book(item_id, tier, nbytes)
            entry.moving = True
        source, target, copied = entry.tier, self._places[tier], False
        try:
            target.take(self._read(item_id, source, entry.nbytes))
            copied = True
        finally:
            with self._lock:
                entry.moving = False
                moved = copied and not entry.leases and not entry.gone
                if moved:
                    entry.metadata = target.marked(entry.metadata)
                    entry.tier, tier = tier, entry.tier  # what is freed below is the old place
                    entry.nbytes, nbytes = nbytes, entry.nbytes
                self._used[tier] -= nbytes
                if copied:
                    self.pending_deletes.drop(self._places[tier], tier, item_id, nbytes, entry.metadata)
                self._free_if_gone(item_id, entry)
        return moved

    def drop(self, item_id: str) -> bool:
        """Forgets the item; at once hidden, and its bytes freed when its last use ends. False if there was none."""
        with self._lock:
            entry = self._entries.get(item_id)
            if entry is None or entry.gone:
                return False
            entry.gone = True
            self._free_if_gone(item_id, entry)
        return True

    def ids(self) -> list[str]:
        with self._lock:
            return [item_id for item_id, entry in self._entries.items() if not entry.gone]

    def tier_of(self, item_id: str) -> str:
        with self._lock:
            return self._entry(item_id).tier

    def metadata(self, item_id: str) -> KVCacheMetadata:
        with self._lock:
            return self._entry(item_id).metadata

    def used_bytes(self) -> dict[str, int]:
        """Booked bytes by tier: what is there, hidden but in use, on its way there, or could not be removed."""
        with self._lock:
            left = self.pending_deletes.by_tier()
            return {tier: used + left[tier] for tier, used in self._used.items()}

    def close(self) -> None:
        """Leaves the disk tier to the next process."""
        for place in self._places.values():
            place.close()

    def nbytes(self, item_id: str) -> int:
        """Of its keys and values, where it is."""
        with self._lock:
            return self._entry(item_id).nbytes

    def size(self, tier: str, tokens: int) -> int:
        """What keys and values of `tokens` take in a tier, of a model with full attention."""
        return self._size(tier, tokens, self._backend.fingerprint.kv_bytes(tokens))

    def _size(self, tier: str, tokens: int, built_bytes: int) -> int:
        if tier not in self.budgets:
            raise ConfigError(f"Unknown tier {tier!r}. {did_you_mean(tier, self.budgets)}")
        return self._places[tier].nbytes(tokens, built_bytes)

    def _read(self, item_id: str, tier: str, nbytes: int) -> KVCacheItem:
        started = time.perf_counter()
        item = self._places[tier].read(item_id)
        if tier in self.measured_tiers:
            if self._backend.device.type == "cuda":  # its copies and kernels are only launched
                torch.cuda.synchronize(self._backend.device)
            self.loads.record(tier, nbytes, time.perf_counter() - started)
        return item

    def _entry(self, item_id: str) -> _Entry:
        entry = self._entries.get(item_id)
        if entry is None or entry.gone:
            raise UnknownMemoryError(f"Not in the tiers: {item_id}. There are {len(self._entries)} items, see ids().")
        return entry

    def _book(self, item_id: str, tier: str, nbytes: int) -> None:
        self.pending_deletes.check_gone(tier, item_id)
        if nbytes > (free := self.budgets[tier] - self._used[tier] - self.pending_deletes.by_tier()[tier]):
            raise BudgetError(
                f"Item {item_id} has {nbytes} bytes, and the tier {tier!r} has {free} left. Drop or demote others."
            )
        self._used[tier] += nbytes

    def _free_if_gone(self, item_id: str, entry: _Entry) -> None:
        if entry.gone and not entry.leases and not entry.moving and self._entries.get(item_id) is entry:
            del self._entries[item_id]
            self._used[entry.tier] -= entry.nbytes
            self.pending_deletes.drop(self._places[entry.tier], entry.tier, item_id, entry.nbytes, entry.metadata)
