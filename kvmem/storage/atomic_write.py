"""Writes a file beside its target and renames it, so that the target is always either the old or the new file."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from errno import ENOENT
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from filelock import FileLock, Timeout

from kvmem.errors import StorageError

LOCK_SUFFIX = ".lock"


@contextmanager
def replacing(path: Path) -> Iterator[io.FileIO]:
    """A new unbuffered file that replaces `path` when the block ends without an error: fsynced, then renamed.

    If the block raises, the new file is removed and `path` is unchanged. If the process dies, `path` is unchanged, and
    the next write to it removes the partial file: its writer holds a lock beside it for as long as it lives.
    Raises StorageError if the file system refuses (no space, no permission, no folder).
    """
    target = path.resolve()  # if `path` is a link, the file that it points to is replaced and the link stays
    try:
        if not target.parent.is_dir():  # FileLock would create it
            raise FileNotFoundError(ENOENT, "No such folder", str(target.parent))
        _remove_abandoned(target)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
        lock_path = _lock_path(partial)
        try:
            with FileLock(lock_path):
                try:
                    with open(partial, "x+b", buffering=0) as file:
                        yield file
                        os.fsync(file.fileno())
                        os.replace(partial, target)
                finally:
                    partial.unlink(missing_ok=True)
        finally:
            lock_path.unlink(missing_ok=True)
        _fsync_folder(target.parent)
    except OSError as error:
        raise StorageError(f"{path} can't be written ({error}). A file that was there before is unchanged.") from error


def write_all(file: io.FileIO, data: memoryview) -> None:
    """Writes every byte. A single call on an unbuffered file may write less (Linux stops at 2 GiB)."""
    while data:
        data = data[file.write(data) :]


def _lock_path(partial: Path) -> Path:
    return partial.with_name(partial.name + LOCK_SUFFIX)


def _remove_abandoned(target: Path) -> None:
    """Removes the partial files of dead writers. A writer locks before it creates its file and unlocks after it ends,
    so a partial file without a holder of its lock is abandoned."""
    for partial in target.parent.glob(f".{target.name}.*.partial"):
        lock_path = _lock_path(partial)
        try:
            with FileLock(lock_path, timeout=0):
                partial.unlink(missing_ok=True)
        except Timeout:
            continue  # another process is writing it
        lock_path.unlink(missing_ok=True)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


CHUNK_BYTES = 4 << 20
"""How much is hashed and then written at once, while it is in the CPU's cache."""
FLUSH_BYTES = 16 << 20


class Digest(Protocol):
    """The interface of hashes in hashlib and xxhash, and of `checksums.RegionHash`."""

    def update(self, data: Any, /) -> None: ...


class HashingWriter:
    """A context manager whose `write` hashes the data into `digest` and writes it to `file`.

    After every `FLUSH_BYTES` a second thread starts to flush to disk, so that the final fsync has little to do. Leaving
    the block waits for the last flush.
    """

    def __init__(self, file: io.FileIO, digest: Digest) -> None:
        self.file, self.digest = file, digest
        self.unflushed_bytes = 0
        self.flusher = ThreadPoolExecutor(max_workers=1)
        self.flush: Future[None] | None = None

    def __enter__(self) -> HashingWriter:
        return self

    def write(self, data: Any) -> int:
        raw = memoryview(data).cast("B")
        for start in range(0, len(raw), CHUNK_BYTES):
            chunk = raw[start : start + CHUNK_BYTES]
            self.digest.update(chunk)
            write_all(self.file, chunk)
        self.unflushed_bytes += len(raw)
        if self.unflushed_bytes >= FLUSH_BYTES and (self.flush is None or self.flush.done()):
            self._check_flush()
            self.flush = self.flusher.submit(os.fdatasync, self.file.fileno())
            self.unflushed_bytes = 0
        return len(raw)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.flusher.shutdown()
        if kind is None:
            self._check_flush()

    def _check_flush(self) -> None:
        """Raises the error of the last flush. The disk reports it once, so the final fsync would not raise it again."""
        if self.flush is not None:
            self.flush.result()
