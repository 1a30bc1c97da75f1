"""Memories as files that an engine injects: one an item, in a folder of its own, as long as they are needed."""

from __future__ import annotations

import tempfile
import threading
import uuid
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kvmem.cache import KV, KVCacheItem, MemoryTokens, ModelFingerprint, dynamic_cache
from kvmem.engines.base import FileHandle, StoredFile
from kvmem.engines.vllm.connector import part_name
from kvmem.errors import StorageError, check_kind
from kvmem.merge import MergeStrategy
from kvmem.prompt import PromptTemplate, Query, TokenizedPrompt
from kvmem.storage import SafetensorsFile

CPU = torch.device("cpu")


def salt_of(cache_salt: str | None, cache_view: FileHandle | None) -> str | None:
    """The salt of the engine's blocks: the tenant's, and that of KV which is not what a prefill of its ids gives."""
    return " ".join(salt for salt in (cache_salt, cache_view.salt if cache_view else None) if salt) or None


def split_behind(template: PromptTemplate, query: Query, kv_cache: FileHandle | None) -> TokenizedPrompt:
    """The prompt of `query`, split at what `kv_cache` holds of it. Raises ArgumentError for another engine's cache."""
    if kv_cache is None:
        return template.bare(query)
    check_kind("What vLLM injects", kv_cache, FileHandle, way_out="get_cache of a memory on this backend gives it.")
    return template.split(kv_cache.tokens, query)


class FileStore:
    """The folder. Each item is written at first need, and once; what is lent keeps its file alive."""

    def __init__(self, parent: Path | None = None, shared: Path | None = None) -> None:
        """parent: where the folder is made; None takes the system's folder for temporary files. shared: a server's own
        folder, to be used as it is; the files written here go one by one, and what others put there stays."""
        if shared is not None:
            self.folder = shared
        else:
            if parent is not None:
                parent.mkdir(parents=True, exist_ok=True)
            self.temporary = tempfile.TemporaryDirectory(prefix="kvmem-", dir=parent, ignore_cleanup_errors=True)
            self.folder = Path(self.temporary.name)
        self.files: weakref.WeakKeyDictionary[KVCacheItem, StoredFile] = weakref.WeakKeyDictionary()
        self.lock = threading.Lock()

    def new_name(self) -> str:
        return f"{uuid.uuid4()}.safetensors"

    def file_of(self, item: KVCacheItem) -> StoredFile:
        """The item's file, written now if it has none yet."""
        with self.lock:
            if item not in self.files:
                self.files[item] = self.write(item)
            return self.files[item]

    def view(self, item: KVCacheItem) -> FileHandle:
        """What is injected for one item; KV of unknown origin is kept apart from what a prefill of its ids gives."""
        file = self.file_of(item)
        return FileHandle(item.metadata.tokens, file, file.name if item.metadata.fingerprint is None else None)

    def view_merged(
        self,
        items: Sequence[KVCacheItem],
        tokens: MemoryTokens,
        separator_ids: tuple[int, ...],
        merge: MergeStrategy,
        model: PreTrainedModel,
    ) -> FileHandle:
        """What is injected for several items that `merge` makes one of, as `tokens`; `model` is where it computes."""
        cache = merge.merge(items, separator_ids, model)
        update = {"tokens": tokens, "kv_bytes": dynamic_cache.nbytes(cache), "textual_memory": None}
        file = self.write(KVCacheItem(cache, items[0].metadata.model_copy(update=update)))
        return FileHandle(tokens, file, file.name)

    def write(self, item: KVCacheItem) -> StoredFile:
        name = self.new_name()
        SafetensorsFile().dump(self.folder / name, [item])
        return StoredFile(self.folder / name)

    def adopt(self, name: str, fingerprint: ModelFingerprint, config: PreTrainedConfig, ranks: int) -> KVCacheItem:
        """The item that an engine has just saved as `name`, its tensors mapped from the file and so read when they are
        used. The ranks of a tensor-parallel engine each wrote their heads; they are put together here.

        Raises StorageError or FingerprintError if what was saved is not whole.
        """
        path = self.folder / name
        if ranks > 1:
            SafetensorsFile().dump(path, [self._joined(name, fingerprint, config, ranks)])
        (item,) = SafetensorsFile().load(path, fingerprint, config, CPU)
        with self.lock:
            self.files[item] = StoredFile(path)
        return item

    def discard(self, name: str, ranks: int) -> None:
        """Removes what an engine wrote of a memory that did not come about: perhaps some ranks' files, perhaps none."""
        for rank in range(ranks):
            (self.folder / part_name(name, rank, ranks)).unlink(missing_ok=True)

    def _joined(self, name: str, fingerprint: ModelFingerprint, config: PreTrainedConfig, ranks: int) -> KVCacheItem:
        paths = [self.folder / part_name(name, rank, ranks) for rank in range(ranks)]
        parts = [SafetensorsFile().load(path, fingerprint, config, CPU)[0] for path in paths]
        layers = [
            _heads_of(pairs, fingerprint.kv_heads)
            for pairs in zip(*(dynamic_cache.layers_of(part.kv_cache) for part in parts), strict=True)
        ]
        for path in paths:
            path.unlink()
        return KVCacheItem(dynamic_cache.from_layers(layers, config), parts[0].metadata, parts[0].kv_cache_id)


def _heads_of(parts: Sequence[KV], kv_heads: int) -> KV:
    """One layer's keys and values with all heads; with more ranks than heads, neighbours hold the same one."""
    every = max(len(parts) // kv_heads, 1)
    kept = parts[::every]
    keys, values = torch.cat([keys for keys, _ in kept], dim=1), torch.cat([values for _, values in kept], dim=1)
    if keys.shape[1] != kv_heads:
        raise StorageError(f"The ranks saved {keys.shape[1]} heads, and the model has {kv_heads}. Extract again.")
    return keys, values
