"""Checksums of consecutive regions of a file's body, so that several threads can verify it in parallel.

A single checksum over the whole body is computed by one core from start to end. The checksum of a region depends on no
other region. xxhash releases the GIL while it hashes (since version 3.0).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from kvmem.errors import DamagedFileError
from kvmem.storage.region_reads import thread_count

REGION_BYTES = 2 << 20
"""The region size of new files; each file states its own. It is small enough that a core hashes what it just read from
its own cache (a load with 8 MiB takes a third longer), and large against the 10 µs that a region costs the host."""
DIGEST_BYTES = xxhash.xxh3_128().digest_size


class RegionHash:
    """Computes the XXH3-128 of each region of the data. `update` accepts pieces of any size."""

    def __init__(self, region_bytes: int = REGION_BYTES) -> None:
        self.region_bytes, self.filled_bytes = region_bytes, 0
        self.current, self.finished = xxhash.xxh3_128(), list[bytes]()

    def update(self, data: Any) -> None:
        raw = memoryview(data).cast("B")
        while raw:
            part = raw[: self.region_bytes - self.filled_bytes]
            self.current.update(part)
            self.filled_bytes += len(part)
            raw = raw[len(part) :]
            if self.filled_bytes == self.region_bytes:
                self.finished.append(self.current.digest())
                self.current, self.filled_bytes = xxhash.xxh3_128(), 0

    def digests(self) -> tuple[bytes, ...]:
        """One digest for each region; the last region may be shorter."""
        return (*self.finished, self.current.digest()) if self.filled_bytes else tuple(self.finished)


@dataclass(frozen=True)
class Regions:
    """The expected digest of each region of a body of `body_bytes`."""

    body_bytes: int
    region_bytes: int
    digests: tuple[bytes, ...]

    def __len__(self) -> int:
        return region_count(self.body_bytes, self.region_bytes)

    def span(self, i: int) -> tuple[int, int]:
        """Start and end of region `i`, in bytes from the start of the body."""
        return i * self.region_bytes, min((i + 1) * self.region_bytes, self.body_bytes)

    def check(self, i: int, data: memoryview, path: Path) -> None:
        """Raises DamagedFileError unless `data` has the digest of region `i`."""
        if xxhash.xxh3_128_digest(data) != self.digests[i]:
            raise checksum_error(path)

    def check_all(self, body: memoryview, path: Path) -> None:
        """Raises DamagedFileError unless every region of `body` has its digest."""

        def check(i: int) -> None:
            start, end = self.span(i)
            self.check(i, body[start:end], path)

        if len(self) == 1:  # starting threads would take longer
            return check(0)
        for_each_region(check, len(self))


def region_count(body_bytes: int, region_bytes: int) -> int:
    """The number of regions of a body."""
    return -(-body_bytes // region_bytes)


def for_each_region(work: Callable[[int], None], regions: int, start_thread: Callable[[], None] | None = None) -> None:
    """Calls `work(i)` for every region in several threads, after `start_thread()` in each thread.

    Raises the first error; regions that have not been started by then are skipped.
    """
    remaining, lock, stop = iter(range(regions)), threading.Lock(), threading.Event()

    def next_region() -> int | None:
        with lock:
            return next(remaining, None)

    def run() -> None:
        try:
            if start_thread is not None:
                start_thread()
            while not stop.is_set() and (i := next_region()) is not None:
                work(i)
        finally:
            stop.set()  # no region remains, or one has failed

    # One task for each thread: a task for each region would cost as much as hashing a tenth of it.
    count = thread_count(regions)
    with ThreadPoolExecutor(count, "kvmem-regions") as pool:
        futures = [pool.submit(run) for _ in range(count)]
    for future in futures:
        future.result()


def checksum_error(path: Path) -> DamagedFileError:
    """The error for a file whose content does not have its checksum."""
    return DamagedFileError(f"{path} is damaged: its checksum does not fit its content. Take another copy of it.")
