"""The store of one tier: the memory of a device, or a folder. And the deletes that could not be done yet."""

from __future__ import annotations

import hashlib
import re
import threading
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from filelock import FileLock, Timeout

from kvmem.cache import KVCacheItem, KVCacheMetadata, dynamic_cache
from kvmem.engines import Backend
from kvmem.errors import DamagedFileError, FingerprintError, StorageError
from kvmem.storage import SafetensorsFile, Storage, manifest, remove_abandoned


class TierStore(ABC):
    """Holds the bytes of one tier."""

    @abstractmethod
    def put(self, item: KVCacheItem) -> None:
        """Copies the item into this store. The given tensors are not modified."""

    @abstractmethod
    def read(self, item_id: str) -> KVCacheItem:
        """The item, as the model or another store can use it."""

    @abstractmethod
    def delete(self, item_id: str) -> None:
        """Deletes the item, which may be missing already. Raises StorageError or OSError if its bytes stay."""

    @property
    def is_measured(self) -> bool:
        """Whether what a read takes tells what a use of an item takes."""
        return True

    def stored_metadata(self, metadata: KVCacheMetadata) -> KVCacheMetadata:
        """The metadata of an item once it has been in this store. It differs only if the store is lossy."""
        return metadata

    def nbytes(self, tokens: int, built_bytes: int) -> int:
        """The bytes in this store of keys and values of `tokens` that had `built_bytes` when they were built."""
        return built_bytes

    def delete_refused(self, name: str) -> None:
        """Deletes a file that `scan` refused. Raises StorageError or OSError if it stays."""
        raise NotImplementedError(f"{type(self).__name__} has no files")

    def close(self) -> None:  # noqa: B027 - a store in memory has nothing to release
        """Releases the store for another process."""


@dataclass(frozen=True)
class PendingDelete:
    """A dropped item whose bytes could not be deleted yet."""

    store: TierStore
    nbytes: int
    """Bytes of its keys and values in that store."""
    metadata: KVCacheMetadata
    reason: str


class PendingDeletes(dict[tuple[str, str], PendingDelete]):
    """(tier, item id) -> the delete that could not be done. Thread-safe.

    The bytes are never read again. They count in the tier's budget until `retry`, or the next process, deletes them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def delete(self, store: TierStore, tier: str, item_id: str, nbytes: int, metadata: KVCacheMetadata) -> bool:
        """Deletes the item, or records why it can't be deleted now; callers need not handle a failed delete.

        Returns whether it was deleted.
        """
        pending = None
        try:
            store.delete(item_id)
        except (StorageError, OSError) as error:  # such as a store that is down
            pending = PendingDelete(store, nbytes, metadata, str(error) or type(error).__name__)
        with self._lock:
            self.pop((tier, item_id), None)
            if pending is not None:
                self[tier, item_id] = pending
        return pending is None

    def retry(self) -> None:
        """Tries every pending delete again, until the first failure in each tier, which is then last in the next retry.

        A store that is down therefore gets one request, and a locked file does not prevent the deletion of others.
        """
        failed = set()
        with self._lock:
            deletes = list(self.items())
        for (tier, item_id), pending in deletes:
            if tier in failed:
                continue
            if not self.delete(pending.store, tier, item_id, pending.nbytes, pending.metadata):
                failed.add(tier)

    def by_tier(self) -> Counter[str]:
        """Bytes that are still to be deleted, by tier."""
        with self._lock:
            return sum((Counter({tier: pending.nbytes}) for (tier, _), pending in self.items()), Counter())

    def check_deleted(self, tier: str, item_id: str) -> None:
        """Raises StorageError if a delete of the item is pending in the tier, because it would delete a new copy."""
        with self._lock:
            pending = self.get((tier, item_id))
        if pending is not None:
            raise StorageError(
                f"The former KV of {item_id} in the tier {tier!r} is not deleted yet ({pending.reason}). "
                "pending_deletes.retry() tries again."
            )

    def explain(self, memory_id: str) -> str:
        """Which former KV of a text memory is still to be deleted, and why, as the end of a sentence; "" if none."""
        with self._lock:
            deletes = [(tier, pending) for (tier, _), pending in self.items()]
        return "".join(
            f"; {pending.nbytes} bytes of former KV are still in {tier}: {pending.reason}"
            for tier, pending in deletes
            if pending.metadata.textual_memory is not None and pending.metadata.textual_memory.id == memory_id
        )


@dataclass(frozen=True)
class ScannedItem:
    """An item that an earlier process left in a store."""

    item_id: str
    metadata: KVCacheMetadata
    nbytes: int
    """Bytes of its keys and values."""


@dataclass(frozen=True)
class RefusedFile:
    """A file that an earlier process left in a store, and that can't be used: it is damaged, or another model's."""

    name: str
    reason: str
    ids: frozenset[str] | None
    """The text memories or groups that it states. None if its manifest can't be read: it may be of any."""

    @property
    def is_of_a_store(self) -> bool:
        """Whether its name is one that a store gives. A store leaves any other file alone if it states no memory."""
        return STEM.fullmatch(self.name.rpartition(".")[0]) is not None


STEM = re.compile("[0-9a-f]{32}")
"""The name of an item's file without its suffix."""


def stem_of(item_id: str) -> str:
    """The name of the item's file without its suffix."""
    return hashlib.sha256(item_id.encode()).hexdigest()[:32]


def ids_in(manifest_json: str, path: Path) -> frozenset[str] | None:
    """The text memories or groups that a manifest is about; None if it can't be read."""
    try:
        items = manifest.from_json(manifest_json, path).items
    except (StorageError, ValueError):
        return None
    sources = [item.metadata.textual_memory for item in items]
    return frozenset(source.id for source in sources if source is not None) if all(sources) else None


class MemoryStore(TierStore):
    """Tensors on a device. `pinned`: in page-locked host memory, which a GPU reads at full speed."""

    def __init__(self, backend: Backend, device: torch.device, pinned: bool) -> None:
        self._backend, self._device, self._pinned = backend, device, pinned
        self._items: dict[str, KVCacheItem] = {}

    def put(self, item: KVCacheItem) -> None:
        cache = dynamic_cache.converted(item.kv_cache, self._copy, self._backend.model_config)
        self._items[item.kv_cache_id] = KVCacheItem(cache, item.metadata, item.kv_cache_id)

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device, pin_memory=self._pinned)
        return copy.copy_(tensor)

    @property
    def is_measured(self) -> bool:
        return False

    def read(self, item_id: str) -> KVCacheItem:
        return self._items[item_id]

    def delete(self, item_id: str) -> None:
        self._items.pop(item_id, None)


def check_place(item_id: str, expected: str, found: str) -> None:
    """Raises StorageError if an item is in a file of another name than its id gives, where no read would find it."""
    if expected != found:
        raise StorageError(f"{found} holds the item {item_id}, which belongs into {expected}. Rename the file.")


class DiskStore(TierStore):
    """A folder with one file for each item, replaced atomically and verified when it is read. One process at a time."""

    def __init__(self, backend: Backend, folder: Path, format: Storage | None = None) -> None:
        """format: the format of the files; None means SafetensorsFile.

        Raises StorageError if another process, or another store of this one, uses the folder.
        """
        self._backend, self._folder, self._format = backend, folder, format or SafetensorsFile()
        self._lock = FileLock(folder / ".lock", timeout=0, thread_local=False)  # held until `close`
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout as error:
            raise StorageError(f"{folder} is another process's tier. Give this one a folder of its own.") from error
        except OSError as error:
            raise StorageError(f"{folder} can't hold a tier ({error}). Give another folder.") from error
        remove_abandoned(folder)

    @staticmethod
    def file_of(folder: Path, item_id: str) -> Path:
        """The path of the item's file in a store in `folder`."""
        return folder / f"{stem_of(item_id)}.safetensors"

    def path(self, item_id: str) -> Path:
        """The path of the item's file."""
        return self.file_of(self._folder, item_id)

    def put(self, item: KVCacheItem) -> None:
        self._format.dump(self.path(item.kv_cache_id), [item])

    def read(self, item_id: str) -> KVCacheItem:
        return self._load(self.path(item_id))

    def delete(self, item_id: str) -> None:
        self.path(item_id).unlink(missing_ok=True)

    def scan(self) -> tuple[list[ScannedItem], list[RefusedFile]]:
        """The items that an earlier process left, and the files that can't be used."""
        items: list[ScannedItem] = []
        refused: list[RefusedFile] = []
        for path in sorted(self._folder.glob("*.safetensors")):
            try:
                item = self._load(path)
                check_place(item.kv_cache_id, self.path(item.kv_cache_id).name, path.name)
                items.append(ScannedItem(item.kv_cache_id, item.metadata, dynamic_cache.nbytes(item.kv_cache)))
            except (StorageError, FingerprintError) as error:
                refused.append(RefusedFile(path.name, str(error), ids_in_file(path)))
        return items, refused

    def delete_refused(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        self._lock.release()

    def _load(self, path: Path) -> KVCacheItem:
        backend = self._backend
        items = self._format.load(path, backend.fingerprint, backend.model_config, backend.device)
        if len(items) != 1:
            raise DamagedFileError(f"{path} holds {len(items)} items, and files of a tier hold one. Build them again.")
        return items[0]


def ids_in_file(path: Path) -> frozenset[str] | None:
    """As `ids_in`, for a safetensors file."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return ids_in((file.metadata() or {}).get("manifest", ""), path)
    except (OSError, safetensors.SafetensorError):
        return None
