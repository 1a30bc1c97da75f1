"""Memories as files that an engine injects: one file for each item, deleted when the item is no longer used.

On a server a client also keeps a lease, so that the server can delete the files of a client that was killed.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import uuid
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kvmem.cache import KVCacheItem, MemoryTokens, ModelFingerprint, dynamic_cache
from kvmem.engines.base import FileHandle, Injectable, StoredFile
from kvmem.engines.vllm.connector import (
    NAMESPACE_END,
    NO_LEASE,
    join_parts,
    lease_name,
    lease_of,
    memory_name,
    namespace_of,
    renewal_s,
)
from kvmem.errors import NamespaceError, StorageError, check_kind
from kvmem.merge import MergeStrategy
from kvmem.prompt import PromptTemplate, Query, TokenizedPrompt
from kvmem.storage import SafetensorsFile, TemporaryFolder

CPU = torch.device("cpu")


def as_file_handle(kv_cache: Injectable | None) -> FileHandle | None:
    """Raises ArgumentError for a cache of another engine, which holds tensors and is not a file."""
    if kv_cache is None or isinstance(kv_cache, FileHandle):
        return kv_cache
    check_kind("What vLLM injects", kv_cache, FileHandle, way_out="get_cache of a memory on this backend gives it.")
    return None


def tenant_of(cache_salt: str | None, cache_view: FileHandle | None, default: str | None = None) -> str | None:
    """The salt of a request: its own, else the memory's namespace, else the default one.

    Raises NamespaceError if the request gives the salt of another namespace than the memory's.
    """
    namespace = cache_view.namespace if cache_view else ""
    salt = cache_salt or namespace or default
    if namespace and namespace_of(salt) != namespace:
        raise NamespaceError(
            f"The memory belongs to the namespace {namespace!r}, and the request's cache_salt is {cache_salt!r}. Leave "
            "cache_salt out, or use a memory of that namespace."
        )
    return salt


def block_salt(tenant: str | None, cache_view: FileHandle | None) -> str | None:
    """The salt of the engine's blocks: the tenant's, and the salt of KV that differs from a prefill of its ids."""
    return salt_within(tenant, cache_view.salt) if cache_view and cache_view.salt else tenant


def salt_within(tenant: str | None, part: str) -> str:
    """The salt of blocks that only requests with the same `part` share, in the tenant's namespace."""
    return f"{tenant or ''}{NAMESPACE_END}{part}"


class Lease:
    """A client's sign of life in a server's folder: a file that a thread of its own touches every so many seconds."""

    def __init__(self, folder: Path, every_s: float) -> None:
        self.client = uuid.uuid4().hex
        """What the client tells the server as its lease."""
        self.name = lease_of(self.client)
        """What stands in the names of its files."""
        path, ended = folder / lease_name(self.name), threading.Event()
        try:
            path.touch()
        except OSError as error:
            raise StorageError(f"{path} can't be written ({error}). A client writes into a server's store.") from error
        threading.Thread(target=_renew, args=(path, every_s, ended), name="kvmem-lease", daemon=True).start()
        weakref.finalize(self, _end_lease, path, ended)


def _renew(path: Path, every_s: float, ended: threading.Event) -> None:
    while not ended.wait(every_s):
        with suppress(OSError):  # the folder can't be reached for the moment
            path.touch()


def _end_lease(path: Path, ended: threading.Event) -> None:
    ended.set()
    with suppress(OSError):
        path.unlink()


class LeasedFile(StoredFile):
    """A file on a server. It keeps its lease alive."""

    def __init__(self, path: Path, lease: Lease | None) -> None:
        super().__init__(path)
        self.lease = lease


def split_behind(template: PromptTemplate, query: Query, kv_cache: Injectable | None) -> TokenizedPrompt:
    """The prompt of `query`, split at the tokens that `kv_cache` holds of it.

    Raises ArgumentError for a cache of another engine.
    """
    cache_view = as_file_handle(kv_cache)
    return template.bare(query) if cache_view is None else template.split(cache_view.tokens, query)


class FileStore:
    """A folder of memory files. Each item is written once, when it is first needed; a view keeps the file alive."""

    def __init__(
        self,
        parent: Path | None = None,
        shared: Path | None = None,
        orphans_after_s: float | None = None,
        default_namespace: str = "",
    ) -> None:
        """parent: where a temporary folder is created; None uses the system's folder for temporary files.
        shared: use a server's own folder instead. Files that this store writes are deleted one by one; files of other
        clients stay.
        orphans_after_s: when the server deletes files whose client gives no sign of life; None: never.
        default_namespace: of items that state none."""
        if shared is not None:
            self.folder = shared
        else:
            if parent is not None:
                parent.mkdir(parents=True, exist_ok=True)
            self.temporary = TemporaryFolder("kvmem-", parent)
            self.folder = self.temporary.path
        self.lease = None if orphans_after_s is None else Lease(self.folder, renewal_s(orphans_after_s))
        self.default_namespace = default_namespace
        self.files: weakref.WeakKeyDictionary[KVCacheItem, StoredFile] = weakref.WeakKeyDictionary()
        self.links: weakref.WeakValueDictionary[str, StoredFile] = weakref.WeakValueDictionary()
        self.lock = threading.Lock()

    def file_of(self, item: KVCacheItem) -> StoredFile:
        """The item's file, which is written now if it does not exist yet."""
        with self.lock:
            if item not in self.files:
                self.files[item] = self.write(item)
            return self.files[item]

    def adopt_link(self, item: KVCacheItem) -> StoredFile:
        """The file of an item that has one, for as long as it is used: as `linked`."""
        with self.lock:
            file = self.links[item.kv_cache_id] = self.files[item]
            return file

    def linked(self, item_id: str, path: Path, namespace: str) -> StoredFile:
        """A name in this folder for a file of an item that is kept elsewhere: the same for each item as long as it is
        used, so that the engine knows it again. On another disk, it is a copy.

        Raises StorageError if the file is missing or can't be linked.
        """
        with self.lock:
            known = self.links.get(item_id)
            if known is not None and _is_same(known.path, path):
                return known
            lease = NO_LEASE if self.lease is None else self.lease.name
            link = self.folder / memory_name(namespace or self.default_namespace, lease)
            try:
                try:
                    os.link(path, link)
                except OSError as error:
                    if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP):
                        raise
                    shutil.copyfile(path, link)
            except OSError as error:
                raise StorageError(f"{path} can't be given to the engine ({error}).") from error
            file = self.links[item_id] = LeasedFile(link, self.lease)
            return file

    def view(self, item: KVCacheItem) -> FileHandle:
        """The handle of one item. A salt separates KV of unknown origin from what a prefill of its ids gives."""
        file = self.file_of(item)
        salt = file.name if item.metadata.fingerprint is None else None
        return FileHandle(item.metadata.tokens, file, salt, item.metadata.namespace)

    def view_merged(
        self,
        items: Sequence[KVCacheItem],
        tokens: MemoryTokens,
        separator_ids: tuple[int, ...],
        merge: MergeStrategy,
        model: PreTrainedModel,
    ) -> FileHandle:
        """The handle of several items, which `merge` merges into one of `tokens`, computed with `model`."""
        cache = merge.merge(items, separator_ids, model)
        update = {"tokens": tokens, "kv_bytes": dynamic_cache.nbytes(cache), "textual_memory": None}
        update["lossy"] = f"merged by {merge.name}"  # the file alone tells that a prompt of its tokens may not have it
        file = self.write(KVCacheItem(cache, items[0].metadata.model_copy(update=update)))
        return FileHandle(tokens, file, file.name, items[0].metadata.namespace)

    def write(self, item: KVCacheItem) -> StoredFile:
        """Writes the item to a new file, which is deleted with the last reference to the returned object."""
        lease = NO_LEASE if self.lease is None else self.lease.name
        path = self.folder / memory_name(item.metadata.namespace or self.default_namespace, lease)
        SafetensorsFile().dump(path, [item])
        return LeasedFile(path, self.lease)

    def adopt(self, name: str, fingerprint: ModelFingerprint, config: PreTrainedConfig, ranks: int) -> KVCacheItem:
        """The item that an engine has saved as `name`. Its tensors are mapped from the file and read when used.

        Each rank of a tensor-parallel engine wrote a file of its own heads; this joins them into one file.
        Raises StorageError or FingerprintError if a file is incomplete or was written by another model.
        """
        path = self.folder / name
        if ranks > 1:
            join_parts(self.folder, name, fingerprint, config, ranks)
        (item,) = SafetensorsFile().load(path, fingerprint, config, CPU)
        with self.lock:
            self.files[item] = LeasedFile(path, self.lease)
        return item


def _is_same(link: Path, path: Path) -> bool:
    """Whether `link` is still the file, or a copy of it that is no older."""
    try:
        known, now = link.stat(), path.stat()
    except OSError:
        return False
    return os.path.samestat(known, now) or (known.st_dev != now.st_dev and known.st_mtime_ns >= now.st_mtime_ns)
