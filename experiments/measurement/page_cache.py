"""A file that is in the page cache, or not; and what reading it takes at best. Linux only."""

from __future__ import annotations

import os
import time
from pathlib import Path

BLOCK_BYTES = 8 << 20
PAGE_BYTES = 4096
PROBE_EVERY_BYTES = 1 << 20


def drop(path: Path) -> None:
    """Takes the file's pages out of this kernel's cache; what lies below (a host, the disk's own cache) may keep them.

    Pages that are mapped stay: let go of the file's tensors first.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def resident_pct(path: Path) -> float:
    """How much of the file is in the page cache, by one page in each MiB, read only if that takes no disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        offsets = range(0, os.fstat(fd).st_size, PROBE_EVERY_BYTES)
        return 100 * sum(_is_there(fd, offset) for offset in offsets) / len(offsets)
    finally:
        os.close(fd)


def _is_there(fd: int, offset: int) -> bool:
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
