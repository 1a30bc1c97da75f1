"""How much memory of its own a piece of work takes at its peak, pages of files left out."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

EVERY_S = 0.001
STATUS = Path("/proc/self/status")


def now_bytes() -> int:
    """Anonymous memory of this process: what malloc and torch hold, and not the mapped files (Linux's RssAnon)."""
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no RssAnon; it is in Linux 4.5 and later")


def is_reported() -> bool:
    """Whether this system reports it; Linux does."""
    return STATUS.exists()


def release() -> None:
    """Gives back what is free: memory that malloc kept would be used again unseen, and hide a second copy."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # glibc's, which torch's Linux wheels need anyway


def peak_extra_bytes(work: Callable[[], T]) -> tuple[T, int]:
    """What `work` returns, and by how many bytes anonymous memory rose above its start, looked at every millisecond."""
    release()
    done = threading.Event()
    before = highest = now_bytes()

    def watch() -> None:
        nonlocal highest
        while not done.wait(EVERY_S):
            highest = max(highest, now_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = work()
    finally:
        done.set()
        watcher.join()
    return result, max(highest, now_bytes()) - before
