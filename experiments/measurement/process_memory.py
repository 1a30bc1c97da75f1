"""Measures the peak of a process's anonymous memory, which excludes mapped files."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

INTERVAL_S = 0.001
STATUS = Path("/proc/self/status")


def now_bytes() -> int:
    """The anonymous memory of this process in bytes (Linux's RssAnon).

    It includes memory from malloc and torch, but no mapped files. Raises OSError if the kernel does not report it.
    """
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no RssAnon, which needs Linux 4.5 or later")


def is_reported() -> bool:
    """Whether the operating system reports anonymous memory. Linux does."""
    return STATUS.exists()


def release() -> None:
    """Returns free memory to the operating system. Otherwise malloc reuses it, and a new copy would not be visible."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # a function of glibc, which torch's Linux wheels require


def peak_extra_bytes(work: Callable[[], T]) -> tuple[T, int]:
    """Runs `work`. Returns its result, and the peak of anonymous memory above the level before, in bytes.

    Memory is sampled every millisecond.
    """
    release()
    done = threading.Event()
    before = highest = now_bytes()

    def watch() -> None:
        nonlocal highest
        while not done.wait(INTERVAL_S):
            highest = max(highest, now_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = work()
    finally:
        done.set()
        watcher.join()
    return result, max(highest, now_bytes()) - before
