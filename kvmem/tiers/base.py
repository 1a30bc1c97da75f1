"""Where the bytes of a tier lie: a device's memory, or a folder."""

from __future__ import annotations

import fcntl
import hashlib
import threading
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from kvmem.cache import KVCacheItem, KVCacheMetadata, dynamic_cache
from kvmem.engines import Backend
from kvmem.errors import FingerprintError, StorageError
from kvmem.storage import SafetensorsFile, Storage


class TierStore(ABC):
    """Where one tier's bytes lie."""

    @abstractmethod
    def take(self, item: KVCacheItem) -> None:
        """Copies the item here; what it was made of is not touched."""

    @abstractmethod
    def read(self, item_id: str) -> KVCacheItem:
        """The item, usable by the model or by another place."""

    @abstractmethod
    def drop(self, item_id: str) -> None:
        """Forgets the item; no error where its bytes are gone already. StorageError or OSError where they stay."""

    def marked(self, metadata: KVCacheMetadata) -> KVCacheMetadata:
        """What is known of an item once it has been here: more than before only where something is lost."""
        return metadata

    def nbytes(self, tokens: int, built_bytes: int) -> int:
        """What keys and values of `tokens` take here, that took `built_bytes` when they were built."""
        return built_bytes

    def close(self) -> None:  # noqa: B027 - memory has nothing to hand back
        """Hands back what another process could use."""


@dataclass(frozen=True)
class PendingDelete:
    """Bytes of a forgotten item that could not be removed."""

    place: TierStore
    nbytes: int
    """Of its keys and values, where they are."""
    metadata: KVCacheMetadata
    reason: str


class PendingDeletes(dict[tuple[str, str], PendingDelete]):
    """(tier, item id) -> what is left of the item there. Thread-safe.

    Nothing reads it, and it counts in the tier's budget until it is gone: by `retry`, or with the next process.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def drop(self, place: TierStore, tier: str, item_id: str, nbytes: int, metadata: KVCacheMetadata) -> bool:
        """Drops the item where that can be done, and else names it here: who forgets an item needs no answer."""
        left = None
        try:
            place.drop(item_id)
        except (StorageError, OSError) as error:  # a store that is down, say
            left = PendingDelete(place, nbytes, metadata, str(error) or type(error).__name__)
        with self._lock:
            self.pop((tier, item_id), None)
            if left is not None:
                self[tier, item_id] = left
        return left is None

    def retry(self) -> None:
        """Drops what can be dropped now. A tier's first failure ends its turn, and is the last in the next: a store
        that is down is asked once, and a file that is locked keeps no other from being removed."""
        failed = set()
        with self._lock:
            known = list(self.items())
        for (tier, item_id), left in known:
            if tier not in failed and not self.drop(left.place, tier, item_id, left.nbytes, left.metadata):
                failed.add(tier)

    def by_tier(self) -> Counter[str]:
        """Bytes of all that is left, by tier."""
        with self._lock:
            return sum((Counter({tier: left.nbytes}) for (tier, _), left in self.items()), Counter())

    def check_gone(self, tier: str, item_id: str) -> None:
        """Raises StorageError where something of the item is left in the tier: its removal would take a new copy."""
        with self._lock:
            left = self.get((tier, item_id))
        if left is not None:
            raise StorageError(
                f"What {item_id} left in the tier {tier!r} is not removed yet ({left.reason}). "
                "pending_deletes.retry() tries again."
            )

    def explain(self, memory_id: str) -> str:
        """What is left of a memory's former KV, and why, as the end of a sentence; "" if nothing."""
        with self._lock:
            known = [(tier, left) for (tier, _), left in self.items()]
        return "".join(
            f"; {left.nbytes} bytes of former KV are still in {tier}: {left.reason}"
            for tier, left in known
            if left.metadata.textual_memory is not None and left.metadata.textual_memory.id == memory_id
        )


@dataclass(frozen=True)
class Found:
    """An item that an earlier process left in a place."""

    item_id: str
    metadata: KVCacheMetadata
    nbytes: int
    """Of its keys and values."""


class MemoryStore(TierStore):
    """Tensors on a device; `pinned`: in host memory that a GPU reads at full speed."""

    def __init__(self, backend: Backend, device: torch.device, pinned: bool) -> None:
        self._backend, self._device, self._pinned = backend, device, pinned
        self._items: dict[str, KVCacheItem] = {}

    def take(self, item: KVCacheItem) -> None:
        layers = [(self._copy(keys), self._copy(values)) for keys, values in dynamic_cache.layers_of(item.kv_cache)]
        cache = dynamic_cache.from_layers(layers, self._backend.model_config, item.kv_cache.get_seq_length())
        self._items[item.kv_cache_id] = KVCacheItem(cache, item.metadata, item.kv_cache_id)

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device, pin_memory=self._pinned)
        return copy.copy_(tensor)

    def read(self, item_id: str) -> KVCacheItem:
        return self._items[item_id]

    def drop(self, item_id: str) -> None:
        del self._items[item_id]


class DiskStore(TierStore):
    """One safetensors file an item, written beside and renamed; verified while it is read."""

    def __init__(self, backend: Backend, folder: Path, format: Storage | None = None) -> None:
        """format: what a file is like; None: safetensors that are mapped."""
        self._backend, self._folder, self._format = backend, folder, format or SafetensorsFile()
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(folder / ".lock", "w")  # noqa: SIM115 - held as long as the place is
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(f"{folder} is another process's tier. Give this one a folder of its own.") from error
        for partial in folder.glob(".*.partial"):  # of a writer that was killed; the lock says that it is gone
            partial.unlink()

    @staticmethod
    def file_of(folder: Path, item_id: str) -> Path:
        """Where the item's file is, in a tier that lies in `folder`."""
        return folder / f"{hashlib.sha256(item_id.encode()).hexdigest()[:32]}.safetensors"

    def path(self, item_id: str) -> Path:
        return self.file_of(self._folder, item_id)

    def take(self, item: KVCacheItem) -> None:
        self._format.dump(self.path(item.kv_cache_id), [item])

    def read(self, item_id: str) -> KVCacheItem:
        return self._load(self.path(item_id))

    def drop(self, item_id: str) -> None:
        self.path(item_id).unlink(missing_ok=True)

    def found(self) -> tuple[list[Found], dict[str, str]]:
        """The items that an earlier process left, and by file name the reason why the others were refused."""
        items: list[Found] = []
        refused: dict[str, str] = {}
        for path in sorted(self._folder.glob("*.safetensors")):
            try:
                item = self._load(path)
                items.append(Found(item.kv_cache_id, item.metadata, dynamic_cache.nbytes(item.kv_cache)))
            except (StorageError, FingerprintError) as error:
                refused[path.name] = str(error)
        return items, refused

    def close(self) -> None:
        self._lock.close()

    def _load(self, path: Path) -> KVCacheItem:
        return self._format.load(path, self._backend.fingerprint, self._backend.model_config, self._backend.device)[0]
