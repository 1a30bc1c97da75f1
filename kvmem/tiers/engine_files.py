"""A tier of a vLLM engine: files that the engine injects, and holds in host memory or in its own blocks."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from kvmem.cache import KVCacheItem, KVCacheMetadata, dynamic_cache
from kvmem.engines import FileHandle, StoredFile
from kvmem.engines.vllm import VLLMBackend
from kvmem.errors import EngineError, FingerprintError, InjectionError, StorageError
from kvmem.tiers.base import DiskStore, RefusedFile, ScannedItem, ids_in_file, stem_of

LEVELS = ("gpu", "ram", "disk")
SUFFIX = ".safetensors"


class EngineFiles(DiskStore):
    """One of the tiers `gpu`, `ram` and `disk` of a vLLM engine.

    In every tier an item has its file, so it survives the process. In `ram` the engine has read it into its host memory
    ahead of time. In `gpu` its whole blocks are pinned in the engine's prefix cache too.

    The tiers share a folder, and each has a folder in it, where an empty file says which items are in the tier. A move
    leaves the file as it is, so the engine knows it again.
    """

    def __init__(self, backend: VLLMBackend, folder: Path, level: str) -> None:
        """folder: of all tiers together."""
        super().__init__(backend, folder / level)
        self.engine, self.level, self.parent = backend, level, folder
        self.links: dict[str, StoredFile] = {}
        """By item, the file in the engine's own folder."""
        self.pinned: dict[str, KVCacheItem] = {}

    @property
    def is_measured(self) -> bool:
        return self.level == "disk"

    def path(self, item_id: str) -> Path:
        return self.file_of(self.parent, item_id)

    def put(self, item: KVCacheItem) -> None:
        """Raises StorageError, also if the engine has no room to pin the item."""
        path = self.path(item.kv_cache_id)
        try:
            self._mark(item.kv_cache_id).touch()
            if item in self.engine.store.files and not path.exists():
                own = self.links[item.kv_cache_id] = self.engine.store.adopt_link(item)
                _link(own.path, path)
        except OSError as error:
            raise StorageError(f"{path} can't be written ({error}). Give the scheduler another folder.") from error
        if not path.exists():  # it was read from elsewhere, or the engine's folder is on another disk
            super().put(item)
        self._bring(item)

    def scan(self) -> tuple[list[ScannedItem], list[RefusedFile]]:
        """As that of DiskStore. What the tier holds is brought to where the tier is."""
        items: list[ScannedItem] = []
        refused: list[RefusedFile] = []
        for mark in sorted(mark for mark in self._folder.iterdir() if not mark.name.startswith(".")):
            path = self.parent / f"{mark.name}{SUFFIX}"
            if not path.exists():  # the process was killed while it wrote or deleted the file
                mark.unlink()
                continue
            try:
                item = self._load(path)
                items.append(ScannedItem(item.kv_cache_id, item.metadata, dynamic_cache.nbytes(item.kv_cache)))
                self._bring(item)
            except (StorageError, FingerprintError) as error:
                if not items or items[-1].item_id != item.kv_cache_id:
                    refused.append(RefusedFile(path.name, str(error), ids_in_file(path)))
        return items, refused

    def delete_refused(self, name: str) -> None:
        (self.parent / name).unlink(missing_ok=True)
        (self._folder / name.removesuffix(SUFFIX)).unlink(missing_ok=True)

    def delete(self, item_id: str) -> None:
        pinned = self.pinned.pop(item_id, None)
        if pinned is not None:
            with suppress(EngineError):  # it ended with an engine that was reset
                self.engine.pins.unpin(pinned)
        mark = self._mark(item_id)
        if not any((self.parent / level / mark.name).exists() for level in LEVELS if level != self.level):
            super().delete(item_id)
        mark.unlink(missing_ok=True)
        self.links.pop(item_id, None)

    def handle(self, item_id: str, metadata: KVCacheMetadata) -> FileHandle:
        """The file as the engine injects it. Raises StorageError if it is gone."""
        self.links[item_id] = self.engine.store.linked(item_id, self.path(item_id), metadata.namespace)
        return FileHandle(metadata.tokens, self.links[item_id], None, metadata.namespace)

    def _mark(self, item_id: str) -> Path:
        return self._folder / stem_of(item_id)

    def _bring(self, item: KVCacheItem) -> None:
        if self.level == "disk":
            return
        handle = self.handle(item.kv_cache_id, item.metadata)
        assert handle.file is not None
        try:
            self.engine.prefetch([handle])
            if self.level == "gpu" and item.kv_cache_id not in self.pinned:
                self.engine.store.files[item] = handle.file
                self.engine.pins.pin(item)
                self.pinned[item.kv_cache_id] = item
        except (EngineError, InjectionError) as error:
            raise StorageError(f"{item.kv_cache_id} can't be brought to the tier {self.level!r}: {error}") from error


def _link(source: Path, target: Path) -> None:
    """Makes `target` another name of the file, if both are on one disk."""
    with suppress(OSError):
        os.link(source, target)
