"""Writes a file beside its target and renames it, so that the target is always either the old or the new file."""

from __future__ import annotations

import glob
import hashlib
import io
import os
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from errno import ELOOP, ENOENT
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from filelock import FileLock

from kvmem.errors import StorageError

PARTIAL_SUFFIX, LOCK_SUFFIX = ".partial", ".lock"
LONGEST_STEM = 160
"""Bytes of a file's name that the name of its partial file repeats. File systems allow 255 bytes for a whole name."""
OLD_LOCK_S = 600
"""A lock file without a partial file is left alone for so long: its writer may be about to lock it."""


@contextmanager
def replacing(path: Path) -> Iterator[io.FileIO]:
    """A new unbuffered file that replaces `path` when the block ends without an error: fsynced, then renamed.

    If the block raises, the new file is removed and `path` is unchanged. If the process dies, `path` is unchanged, and
    the next write to it removes the partial file: its writer holds a lock beside it for as long as it lives.
    Raises StorageError if the file system refuses (no space, no permission, no folder).
    """
    try:
        target = _target(path)
        if not target.parent.is_dir():  # FileLock would create it
            raise FileNotFoundError(ENOENT, "No such folder", str(target.parent))
        _remove_abandoned(target.parent, _stem(target))
        partial = target.with_name(f".{_stem(target)}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
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


def remove_abandoned(folder: Path) -> None:
    """Removes every partial file in `folder` whose writer is dead. What can't be removed stays."""
    _remove_abandoned(folder, "*")


def write_all(file: io.FileIO, data: memoryview) -> None:
    """Writes every byte. A single call on an unbuffered file may write less (Linux stops at 2 GiB)."""
    while data:
        data = data[file.write(data) :]


def _target(path: Path) -> Path:
    """`path`, or the file that it points to if it is a link: that file is replaced and the link stays."""
    try:
        return path.resolve()
    except RuntimeError:  # pathlib's error for links in a circle
        raise OSError(ELOOP, os.strerror(ELOOP), str(path)) from None


def _stem(target: Path) -> str:
    """What the names of the target's partial files begin with: its name, or a hash of a name that is too long."""
    name = os.fsencode(target.name)
    return target.name if len(name) <= LONGEST_STEM else hashlib.sha256(name).hexdigest()


def _lock_path(partial: Path) -> Path:
    return partial.with_name(partial.name + LOCK_SUFFIX)


def _remove_abandoned(folder: Path, stem: str) -> None:
    """Removes the partial files of dead writers. A writer locks before it creates its file and unlocks after it ends,
    so a partial file without a holder of its lock is abandoned.

    A file that can't be locked or removed stays: it is another writer's, who may be at work, or of another user. No
    error of it is this caller's.
    """
    pattern = stem if stem == "*" else glob.escape(stem)
    for partial in folder.glob(f".{pattern}.*{PARTIAL_SUFFIX}"):
        lock_path = _lock_path(partial)
        try:
            with FileLock(lock_path, timeout=0):
                partial.unlink(missing_ok=True)
            lock_path.unlink(missing_ok=True)
        except OSError:  # filelock's Timeout is one
            continue
    for lock_path in folder.glob(f".{pattern}.*{PARTIAL_SUFFIX}{LOCK_SUFFIX}"):  # of a writer killed behind its rename
        with suppress(OSError):
            if time.time() - lock_path.stat().st_mtime > OLD_LOCK_S:
                lock_path.unlink()


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
