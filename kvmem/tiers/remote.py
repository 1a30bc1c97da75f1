"""The tier `cold`: a remote store that fsspec reaches by a URL (a network folder, an object store)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec

from kvmem.cache import KVCacheItem
from kvmem.engines import Backend
from kvmem.errors import FingerprintError, StorageError
from kvmem.storage import SafetensorsFile, TemporaryFolder, manifest
from kvmem.tiers.base import STEM, RefusedFile, ScannedItem, TierStore, check_place, ids_in, stem_of


class RemoteStore(TierStore):
    """Two files for each item: the tensors, in the same file as on disk, and then the manifest, as JSON.

    An item exists once its manifest is written, so a killed writer leaves no half-written item, and items are listed
    without fetching their tensors. A read fetches the whole file and verifies its checksum. One process at a time:
    unlike a disk tier, a remote store can't be locked. Every method raises StorageError if the store fails.
    """

    def __init__(self, backend: Backend, url: str) -> None:
        """Opens the store at `url`, for example `s3://bucket/folder`; the folder is created."""
        self._backend, self._url, self._format = backend, url, SafetensorsFile()
        with self._store_errors("opened"):
            self._store, self._root = fsspec.core.url_to_fs(url)
            self._store.makedirs(self._root, exist_ok=True)

    def put(self, item: KVCacheItem) -> None:
        tensors, metadata = self._names(item.kv_cache_id)
        with TemporaryFolder("kvmem-cold-") as folder:
            local = folder / "item.safetensors"
            self._format.dump(local, [item])
            try:
                with self._store_errors("written"):
                    self._store.put_file(str(local), tensors)
                    self._store.pipe_file(metadata, manifest.to_json([item]).encode())
            except StorageError:
                with suppress(StorageError):  # else the next process removes what was written so far
                    self.delete(item.kv_cache_id)
                raise

    def read(self, item_id: str) -> KVCacheItem:
        tensors, _ = self._names(item_id)
        with TemporaryFolder("kvmem-cold-") as folder:
            local = folder / "item.safetensors"
            with self._store_errors("read"):
                self._store.get_file(tensors, str(local))
            backend = self._backend
            return self._format.load(local, backend.fingerprint, backend.model_config, backend.device)[0]

    def delete(self, item_id: str) -> None:
        self._delete(f"{self._root}/{stem_of(item_id)}")

    def _delete(self, stem: str) -> None:
        with self._store_errors("removed"):
            for name in (f"{stem}.json", f"{stem}.safetensors"):
                with suppress(FileNotFoundError):
                    self._store.rm_file(name)

    def scan(self) -> tuple[list[ScannedItem], list[RefusedFile]]:
        """The items that an earlier process left, and the files that can't be used."""
        items: list[ScannedItem] = []
        refused: list[RefusedFile] = []
        with self._store_errors("listed"):
            names = {str(name).rpartition("/")[2] for name in self._store.ls(self._root, detail=False, refresh=True)}
            for name in sorted(names):
                stem, _, suffix = name.rpartition(".")
                if suffix == "safetensors" and STEM.fullmatch(stem) and f"{stem}.json" not in names:
                    # from a killed writer
                    self._store.rm_file(f"{self._root}/{name}")
                elif suffix == "json":
                    text = self._store.cat_file(f"{self._root}/{name}").decode(errors="replace")
                    try:
                        contents = manifest.from_json(text, Path(name))
                        manifest.check_model(contents, self._backend.fingerprint, Path(name))
                        for entry in contents.items:
                            manifest.check_size(
                                entry, self._backend.fingerprint, self._backend.model_config, Path(name)
                            )
                            check_place(entry.kv_cache_id, self._names(entry.kv_cache_id)[1].rpartition("/")[2], name)
                        items += [ScannedItem(i.kv_cache_id, i.metadata, i.metadata.kv_bytes) for i in contents.items]
                    except (StorageError, FingerprintError) as error:
                        refused.append(RefusedFile(name, str(error), ids_in(text, Path(name))))
        return items, refused

    def delete_refused(self, name: str) -> None:
        self._delete(f"{self._root}/{Path(name).stem}")

    def _names(self, item_id: str) -> tuple[str, str]:
        stem = f"{self._root}/{stem_of(item_id)}"
        return f"{stem}.safetensors", f"{stem}.json"

    @contextmanager
    def _store_errors(self, done: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ImportError, ValueError) as error:  # fsspec raises ValueError for an unknown protocol
            raise StorageError(f"The cold tier {self._url} can't be {done} ({error}). Check its URL.") from error
