"""Reads regions of a file into given memory, and verifies each by its checksum; on threads, or in a process of its own.

Run as a script, it serves one parent process through a socket. It imports no more than xxhash then, so it starts in a
tenth of a second. Why a process: an engine's thread runs Python almost all the time, and each thread that reads needs
Python's lock for a moment in every region. Behind a busy thread it gets the lock after 5 ms, so reading takes several
times longer, and the engine loses the lock as often.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import xxhash

MAX_THREADS = 8
"""An estimate: eight threads that each read and hash 4 GB/s exceed a disk and come near a GPU's link."""
HEADER = struct.Struct("<QQ")
"""In front of each message: the number of the job, and the bytes of what follows."""


class Part(NamedTuple):
    """Bytes of a region that are wanted."""

    at: int
    """Where they begin in the region."""
    memory_at: int
    """Where they go in the memory."""
    nbytes: int


class RegionRead(NamedTuple):
    """A region to read."""

    at: int
    """Where it begins in the file."""
    nbytes: int
    digest: bytes
    """Its XXH3-128."""
    parts: tuple[Part, ...]
    """In order; they do not overlap."""


class RateLimit:
    """Limits reads to so many bytes a second, all threads together; None: no limit."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self.bytes_per_s = bytes_per_s
        self.lock = threading.Lock()
        self.free_at = 0.0

    def pause_s(self, nbytes: int) -> float:
        """How long to wait before so many bytes are read."""
        if self.bytes_per_s is None:
            return 0.0
        with self.lock:
            self.free_at = max(self.free_at, time.monotonic()) + nbytes / self.bytes_per_s
            return self.free_at - time.monotonic()


def thread_count(regions: int) -> int:
    """How many threads work on so many regions: at most one for each core, because hashing keeps a core busy."""
    return max(min(MAX_THREADS, os.cpu_count() or 1, regions), 1)


def read_exactly(file: int, data: memoryview, at: int) -> bool:
    """Fills `data` from byte `at` of the file. Returns False if the file ends before. Thread-safe."""
    while data:
        count = os.preadv(file, [data], at)
        if not count:
            return False
        data, at = data[count:], at + count
    return True


def read_region(file: int, region: RegionRead, memory: memoryview) -> bool:
    """Reads one region. Returns False if it does not have its checksum; its parts of the memory then hold anything.

    file: a file descriptor. memory: bytes, writable. A region that is wanted whole is read to its place, and hashed
    there while it is in the CPU's cache. Raises OSError.
    """
    digest = xxhash.xxh3_128()
    if sum(part.nbytes for part in region.parts) == region.nbytes:
        for part in region.parts:
            target = memory[part.memory_at : part.memory_at + part.nbytes]
            if not read_exactly(file, target, region.at + part.at):
                return False
            digest.update(target)
        return digest.digest() == region.digest
    whole = memoryview(bytearray(region.nbytes))
    if not read_exactly(file, whole, region.at):
        return False
    digest.update(whole)
    if digest.digest() != region.digest:
        return False
    for part in region.parts:
        memory[part.memory_at : part.memory_at + part.nbytes] = whole[part.at : part.at + part.nbytes]
    return True


# --- the process ---


class _Job:
    """A list of regions to read, whose outcome is sent once all have been read, or one has failed."""

    def __init__(self, number: int, file: int, regions: Sequence[RegionRead]) -> None:
        self.number, self.file, self.regions = number, file, regions
        self.lock = threading.Lock()
        self.left = len(regions)
        self.outcome: tuple[str, int, str] = ("", 0, "")

    def run(self, region: RegionRead, memory: memoryview, limit: RateLimit) -> bool:
        """Reads a region. Returns whether it was the last one."""
        outcome = ("", 0, "")
        if not self.outcome[0]:
            time.sleep(limit.pause_s(region.nbytes))
            try:
                if not read_region(self.file, region, memory):
                    outcome = ("damaged", 0, "")
            except OSError as error:
                outcome = ("error", error.errno or 0, error.strerror or str(error))
            except (ValueError, TypeError, MemoryError) as error:  # the parent must hear of everything
                outcome = ("error", 0, repr(error))
        with self.lock:
            self.outcome = self.outcome if self.outcome[0] else outcome
            self.left -= 1
            return not self.left


def _received(link: socket.socket, nbytes: int) -> bytes:
    """So many bytes. Raises EOFError if the parent has ended."""
    data = bytearray()
    while len(data) < nbytes:
        more = link.recv(min(nbytes - len(data), 1 << 20))
        if not more:
            raise EOFError
        data += more
    return bytes(data)


def serve(link: socket.socket, memory: memoryview, bytes_per_s: float | None) -> None:
    """Reads what the parent asks for, until it closes the socket.

    A message is HEADER with the file's descriptor, and a pickled sequence of RegionRead's fields. An answer is HEADER
    and a pickled tuple: "", "damaged" or "error"; errno; text.
    """
    limit, sending = RateLimit(bytes_per_s), threading.Lock()

    def read(job: _Job, region: RegionRead) -> None:
        if job.run(region, memory, limit):
            os.close(job.file)
            answer(job.number, job.outcome)

    def answer(number: int, outcome: tuple[str, int, str]) -> None:
        data = pickle.dumps(outcome)
        with sending, contextlib.suppress(OSError):  # a parent that has ended needs no answer
            link.sendall(HEADER.pack(number, len(data)) + data)

    with ThreadPoolExecutor(thread_count(MAX_THREADS)) as pool, contextlib.suppress(EOFError):
        while True:
            start, files, _, _ = socket.recv_fds(link, HEADER.size, 1)
            if not start:
                os._exit(0)  # without waiting for reads that nobody wants any more
            number, nbytes = HEADER.unpack(start + _received(link, HEADER.size - len(start)))
            fields = pickle.loads(_received(link, nbytes))
            regions = [
                RegionRead(at, size, digest, tuple(Part(*one) for one in parts)) for at, size, digest, parts in fields
            ]
            job = _Job(number, files[0], regions)
            for region in regions:
                pool.submit(read, job, region)
    os._exit(0)


def main(arguments: Sequence[str]) -> None:
    """The process: the descriptors of the socket and of the memory, its bytes, whether to map all of it now, and bytes
    a second (0: no limit)."""
    link, memory, nbytes, populate = map(int, arguments[:4])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the socket
    flags = mmap.MAP_SHARED | (getattr(mmap, "MAP_POPULATE", 0) if populate else 0)
    serve(socket.socket(fileno=link), memoryview(mmap.mmap(memory, nbytes, flags=flags)), float(arguments[4]) or None)


if __name__ == "__main__":
    main(sys.argv[1:])
