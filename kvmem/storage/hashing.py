"""Writing with a checksum on the way, and the disk at work while the next bytes are hashed."""

from __future__ import annotations

import io
import os
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol

from kvmem.storage.atomic import write_all

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
