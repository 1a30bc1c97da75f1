"""The cold tier: any store that fsspec reaches by a URL (a folder elsewhere, an object store)."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec

from kvmem.cache import KVCacheItem
from kvmem.engines import Backend
from kvmem.errors import FingerprintError, StorageError
from kvmem.storage import SafetensorsFile, manifest
from kvmem.tiers.base import Found, TierStore


class RemoteStore(TierStore):
    """Two files an item: the tensors (the same file as on disk), and then what is known of them, as JSON.

    The second makes the item exist, so a writer that is killed leaves none by halves, and what is there can be listed
    without fetching it. A read fetches the whole file, and its checksum vouches for it. One process at a time: unlike
    a disk tier nothing can lock it. Raises StorageError where the store does.
    """

    def __init__(self, backend: Backend, url: str) -> None:
        self._backend, self._url, self._format = backend, url, SafetensorsFile()
        with self._told("opened"):
            self._store, self._root = fsspec.core.url_to_fs(url)
            self._store.makedirs(self._root, exist_ok=True)

    def take(self, item: KVCacheItem) -> None:
        tensors, known = self._names(item.kv_cache_id)
        with tempfile.TemporaryDirectory(prefix="kvmem-cold-") as folder:
            local = Path(folder) / "item.safetensors"
            self._format.dump(local, [item])
            with self._told("written"):
                self._store.put_file(str(local), tensors)
                self._store.pipe_file(known, manifest.to_json([item]).encode())

    def read(self, item_id: str) -> KVCacheItem:
        tensors, _ = self._names(item_id)
        with tempfile.TemporaryDirectory(prefix="kvmem-cold-") as folder:
            local = Path(folder) / "item.safetensors"
            with self._told("read"):
                self._store.get_file(tensors, str(local))
            backend = self._backend
            return self._format.load(local, backend.fingerprint, backend.model_config, backend.device)[0]

    def drop(self, item_id: str) -> None:
        tensors, known = self._names(item_id)
        with self._told("removed"):
            for name in (known, tensors):
                with suppress(FileNotFoundError):
                    self._store.rm_file(name)

    def found(self) -> tuple[list[Found], dict[str, str]]:
        """The items that an earlier process left, and by file name the reason why others were refused."""
        items: list[Found] = []
        refused: dict[str, str] = {}
        with self._told("listed"):
            names = {str(name).rpartition("/")[2] for name in self._store.ls(self._root, detail=False, refresh=True)}
            for name in sorted(names):
                stem, _, suffix = name.rpartition(".")
                if suffix == "safetensors" and f"{stem}.json" not in names:  # of a writer that was killed
                    self._store.rm_file(f"{self._root}/{name}")
                elif suffix == "json":
                    text = self._store.cat_file(f"{self._root}/{name}").decode(errors="replace")
                    try:
                        known = manifest.from_json(text, Path(name))
                        manifest.check_model(known, self._backend.fingerprint, Path(name))
                        items += [Found(i.kv_cache_id, i.metadata, i.metadata.kv_bytes) for i in known.items]
                    except (StorageError, FingerprintError, json.JSONDecodeError) as error:
                        refused[name] = str(error)
        return items, refused

    def _names(self, item_id: str) -> tuple[str, str]:
        stem = f"{self._root}/{hashlib.sha256(item_id.encode()).hexdigest()[:32]}"
        return f"{stem}.safetensors", f"{stem}.json"

    @contextmanager
    def _told(self, done: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ImportError, ValueError) as error:  # ValueError: fsspec's, for a protocol that it has not
            raise StorageError(f"The cold tier {self._url} can't be {done} ({error}). See its URL.") from error
