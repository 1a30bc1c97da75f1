"""A file that is the old one or the new one, whatever happens in between."""

from __future__ import annotations

import fcntl
import io
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from kvmem.errors import StorageError


@contextmanager
def replacing(path: Path) -> Iterator[io.FileIO]:
    """A new unbuffered file beside `path` that takes its place when the block ends well: fsynced and renamed.

    If the block raises, the new file goes and `path` stays as it was. If the process dies, `path` stays as it was and
    the next write removes what is left: a partial file is locked as long as its writer lives.
    Raises StorageError for what the file system refuses (no space, no right, no folder).
    """
    target = path.resolve()  # where `path` is a link, the file behind it is replaced and the link stays
    try:
        _remove_leftovers(target)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
        try:
            with open(partial, "x+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file
                os.fsync(file.fileno())
                os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        _fsync_folder(target.parent)
    except OSError as error:
        raise StorageError(f"{path} can't be written ({error}). A file that was there before is as it was.") from error


def write_all(file: io.FileIO, data: memoryview) -> None:
    """Writes every byte: one call of an unbuffered file may write less (Linux stops at 2 GiB)."""
    while data:
        data = data[file.write(data) :]


def _remove_leftovers(target: Path) -> None:
    for partial in target.parent.glob(f".{target.name}.*.partial"):
        with open(partial, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # another process is writing it
            partial.unlink(missing_ok=True)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


CHUNK_BYTES = 4 << 20  # hashed and written while it is in the CPU's cache
FLUSH_BYTES = 16 << 20


class Digest(Protocol):
    """What hashlib's and xxhash's hashes have, and `regions.RegionHash`."""

    def update(self, data: Any, /) -> None: ...


class HashingWriter:
    """`write` hashes into `digest` and writes; leave the block to have the last flush behind you.

    Every `FLUSH_BYTES` a second thread tells the disk to start, so that the fsync at the end finds little to do.
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
        """Raises what the disk refused: it tells so once, and would not tell the fsync at the end again."""
        if self.flush is not None:
            self.flush.result()
