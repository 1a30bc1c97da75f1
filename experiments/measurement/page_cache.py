"""Drops a file from the page cache, checks what is cached, and measures plain reads. Linux only."""

from __future__ import annotations

import os
import time
from pathlib import Path

BLOCK_BYTES = 8 << 20
PAGE_BYTES = 4096
PROBE_EVERY_BYTES = 1 << 20


def drop(path: Path) -> None:
    """Drops the file's pages from this kernel's page cache.

    Caches below the kernel (a virtual machine's host, the disk) may keep them. Mapped pages stay cached, so delete the
    file's tensors first.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def resident_pct(path: Path) -> float:
    """The share of the file that is in the page cache, in percent.

    It probes one page of each MiB with a read that fails if the page is not cached.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        offsets = range(0, os.fstat(fd).st_size, PROBE_EVERY_BYTES)
        return 100 * sum(_is_cached(fd, offset) for offset in offsets) / len(offsets)
    finally:
        os.close(fd)


def _is_cached(fd: int, offset: int) -> bool:
    try:
        return os.preadv(fd, [bytearray(PAGE_BYTES)], offset, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False


def read_s(path: Path, buffer: bytearray) -> float:
    """Seconds of reading the whole file through a buffer, block by block, as `dd` does."""
    started = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - started
