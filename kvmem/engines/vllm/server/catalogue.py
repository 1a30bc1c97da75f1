"""The memories of a server's store, as its API lists them: what their files state. Does not import vLLM."""

from __future__ import annotations

import os
import shutil
import threading
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from kvmem.cache import Source
from kvmem.engines.vllm.connector import MEMORY_NAME, NO_LEASE, FileState, digest, file_state, is_learned
from kvmem.errors import DuplicateMemoryError, StorageError, UnknownMemoryError
from kvmem.storage import ItemHead, read_head


@dataclass(frozen=True)
class StoredMemory:
    """One file of the store."""

    file: str
    head: ItemHead

    @property
    def id(self) -> str:
        return self.head.entry.kv_cache_id

    @property
    def name(self) -> str:
        """The name that its creator gave; "" if there is none."""
        source = self.head.entry.metadata.textual_memory
        return "" if source is None else source.id

    @property
    def tokens(self) -> int:
        return len(self.head.token_ids)

    @property
    def created_at(self) -> datetime:
        return self.head.entry.metadata.extracted_at

    @property
    def source(self) -> Source:
        return self.head.entry.metadata.tokens.source

    @property
    def is_persistent(self) -> bool:
        """Whether it stays until it is deleted. The others end with the client that made them."""
        parts = MEMORY_NAME.fullmatch(self.file)
        return parts is not None and parts["lease"] == NO_LEASE

    @property
    def is_learned(self) -> bool:
        """Whether the server made it of its traffic. The server may also delete it, to keep its budget."""
        return is_learned(self.head)


class Catalogue:
    """Lists a store by namespace. Headers are read once for each state of a file. Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.heads: dict[str, tuple[FileState, ItemHead]] = {}
        self.lock = threading.Lock()

    def memories(self, namespace: str) -> list[StoredMemory]:
        """Oldest first. A file that can't be read is left out. Raises StorageError if the folder can't be read."""
        own = digest(namespace)
        try:
            names = [
                entry.name
                for entry in os.scandir(self.folder)
                if (parts := MEMORY_NAME.fullmatch(entry.name)) and parts["namespace"] == own
            ]
        except OSError as error:
            raise StorageError(f"{self.folder} can't be read ({error}). It is the server's store.") from error
        found = []
        for name in names:
            try:
                found.append(StoredMemory(name, self._head_of(name)))
            except StorageError:
                continue
        return sorted(found, key=lambda memory: memory.created_at)

    def find(self, namespace: str, wanted: str) -> StoredMemory:
        """The memory of this id or name. Raises UnknownMemoryError, whatever other namespaces have."""
        memories = self.memories(namespace)
        for memory in memories:
            if memory.id == wanted:
                return memory
        named = [memory for memory in memories if memory.name == wanted]
        if not named:
            raise UnknownMemoryError(
                f"No memory {wanted!r} in the namespace {namespace!r}. GET /v1/memories lists them."
            )
        if len(named) > 1:
            raise DuplicateMemoryError(f"{len(named)} memories have the name {wanted!r}. Give the id.")
        return named[0]

    def delete(self, memory: StoredMemory) -> None:
        """Deletes a memory's file. Raises StorageError if the file system refuses."""
        try:
            (self.folder / memory.file).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{memory.file} can't be deleted ({error}).") from error
        with self.lock:
            self.heads.pop(memory.file, None)

    def _head_of(self, name: str) -> ItemHead:
        state = file_state(self.folder / name)
        with self.lock:
            known = self.heads.get(name)
        if known is None or known[0] != state:
            known = state, read_head(self.folder / name)
            with self.lock:
                self.heads[name] = known
        return known[1]


def store_fault(folder: Path, needed_bytes: int) -> str:
    """Why the store can't take a memory of so many bytes now; "" if it can."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"The store can't be reached ({error.strerror})."
    if not os.access(folder, os.W_OK | os.X_OK):
        return "The store can't be written."
    if free < needed_bytes:
        return f"The store's disk is full: {free} bytes are free, and {needed_bytes} are needed. Delete memories."
    return ""
