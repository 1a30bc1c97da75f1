"""A body of bytes as consecutive regions, each with a checksum of its own, so that threads can verify it side by side.

A checksum over everything is one chain, which one core must follow from end to end. Regions have none between them:
who verifies region 5 needs no other. xxhash lets go of Python's lock while it hashes (as it has since its 3.0).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from kvmem.errors import DamagedFileError

REGION_BYTES = 2 << 20
"""What is written now; a file says its own. Small enough that a core hashes what it has just read in its own cache
(with 8 MiB a load takes a third longer), large against the host's 10 µs a region."""
MOST_THREADS = 8
"""An estimate: eight that each read and hash 4 GB/s are beyond a disk, and not far from what a GPU's link takes."""
DIGEST_BYTES = xxhash.xxh3_128().digest_size


class RegionHash:
    """XXH3-128 of each region of what is written; `update` as any hash has it, for pieces of any size."""

    def __init__(self, region_bytes: int = REGION_BYTES) -> None:
        self.region_bytes, self.filled = region_bytes, 0
        self.current, self.closed = xxhash.xxh3_128(), list[bytes]()

    def update(self, data: Any) -> None:
        raw = memoryview(data).cast("B")
        while raw:
            part = raw[: self.region_bytes - self.filled]
            self.current.update(part)
            self.filled += len(part)
            raw = raw[len(part) :]
            if self.filled == self.region_bytes:
                self.closed.append(self.current.digest())
                self.current, self.filled = xxhash.xxh3_128(), 0

    def digests(self) -> tuple[bytes, ...]:
        """One a region, the last of which may be short."""
        return (*self.closed, self.current.digest()) if self.filled else tuple(self.closed)


@dataclass(frozen=True)
class Regions:
    """What each region of a body of `body_bytes` must hash to."""

    body_bytes: int
    region_bytes: int
    digests: tuple[bytes, ...]

    def __len__(self) -> int:
        return count(self.body_bytes, self.region_bytes)

    def span(self, i: int) -> tuple[int, int]:
        """Where region `i` starts and ends, in bytes of the body."""
        return i * self.region_bytes, min((i + 1) * self.region_bytes, self.body_bytes)

    def check(self, i: int, data: memoryview, path: Path) -> None:
        """Raises DamagedFileError unless `data` is region `i`."""
        if xxhash.xxh3_128_digest(data) != self.digests[i]:
            raise damaged(path)

    def check_all(self, body: memoryview, path: Path) -> None:
        """Raises DamagedFileError unless `body` is right in every region."""

        def check(i: int) -> None:
            start, end = self.span(i)
            self.check(i, body[start:end], path)

        if len(self) == 1:  # threads would take longer to start
            return check(0)
        in_threads(check, len(self))


def count(body_bytes: int, region_bytes: int) -> int:
    """How many regions a body has."""
    return -(-body_bytes // region_bytes)


def threads_for(regions: int) -> int:
    """As many as there are cores: hashing leaves none of them waiting."""
    return max(min(MOST_THREADS, os.cpu_count() or 1, regions), 1)


def in_threads(work: Callable[[int], None], regions: int, begin: Callable[[], None] | None = None) -> None:
    """`work(i)` for every region, several at a time, after `begin()` in each thread. Raises what the first failing one
    raised, and leaves those that have not begun."""
    todo, taking, over = iter(range(regions)), threading.Lock(), threading.Event()

    def take() -> int | None:
        with taking:
            return next(todo, None)

    def run() -> None:
        try:
            if begin is not None:
                begin()
            while not over.is_set() and (i := take()) is not None:
                work(i)
        finally:
            over.set()  # all are taken, or one has failed

    # One task a thread and not one a region, each of which would cost as much as hashing a tenth of it.
    count = threads_for(regions)
    with ThreadPoolExecutor(count, "kvmem-regions") as pool:
        running = [pool.submit(run) for _ in range(count)]
    for each in running:
        each.result()


def damaged(path: Path) -> DamagedFileError:
    return DamagedFileError(f"{path} is damaged: its checksum does not fit its content. Take another copy of it.")
