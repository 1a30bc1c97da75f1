"""Reads and verifies regions of files into memory of this process, on its own threads or in a child process."""

from __future__ import annotations

import contextlib
import io
import itertools
import mmap
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from pathlib import Path
from typing import Any

from kvmem.errors import StorageError
from kvmem.storage import region_reads
from kvmem.storage.checksums import checksum_error, for_each_region
from kvmem.storage.region_reads import HEADER, RateLimit, RegionRead, read_region

ENDED = "The engine ends."
CHILD_ENDED = "The process that reads memory files ended. Ask again."
LONGEST_END_S = 5.0


class SharedMemory:
    """Memory that a child process can fill too, where the system is Linux; elsewhere only this process can."""

    def __init__(self, nbytes: int) -> None:
        """Raises OSError."""
        self.nbytes = nbytes
        self.descriptor = -1
        if hasattr(os, "memfd_create"):  # no file that an end of the process could leave behind
            self.descriptor = os.memfd_create("kvmem", os.MFD_CLOEXEC)
            os.ftruncate(self.descriptor, nbytes)
        self.map = mmap.mmap(self.descriptor, nbytes)

    def __del__(self) -> None:
        if getattr(self, "descriptor", -1) >= 0:
            os.close(self.descriptor)


class ThreadReader:
    """Reads on threads of this process."""

    def __init__(self, bytes_per_s: float | None = None) -> None:
        """bytes_per_s: a limit for all reads together; None: none."""
        self.limit = RateLimit(bytes_per_s)
        self.ended = threading.Event()

    def read(self, path: Path, file: io.FileIO, regions: Sequence[RegionRead], memory: Any) -> None:
        """Fills the parts of `memory`, a writable buffer. Thread-safe.

        Raises DamagedFileError, OSError, or StorageError when the engine ends. The parts then hold anything.
        """
        view = memoryview(memory)

        def read_one(number: int) -> None:
            self.ended.wait(self.limit.pause_s(regions[number].nbytes))
            if self.ended.is_set():
                raise StorageError(ENDED)
            if not read_region(file.fileno(), regions[number], view):
                raise checksum_error(path)

        if regions:
            for_each_region(read_one, len(regions))

    def stop(self) -> None:
        """Ends the reads at their next regions."""
        self.ended.set()


class ProcessReader(ThreadReader):
    """Reads into one shared memory in a child process, which `region_reads` describes; into other memory on threads.

    A child that ends, or can't be started, fails the reads that it was given; the next read starts another one.
    """

    def __init__(self, shared: SharedMemory, bytes_per_s: float | None = None, populate: bool = False) -> None:
        """populate: the child maps all of the memory at its start, which allocates it."""
        super().__init__(bytes_per_s)
        self.shared, self.populate = shared, populate
        self.numbers = itertools.count()
        self.waiting: dict[int, Future[tuple[str, int, str]]] = {}
        self.lock = threading.Lock()
        self.link: socket.socket | None = None
        self.child: subprocess.Popen[bytes] | None = None
        with contextlib.suppress(OSError):  # the first read says it
            self._link()

    def read(self, path: Path, file: io.FileIO, regions: Sequence[RegionRead], memory: Any) -> None:
        if memory is not self.shared.map:
            return super().read(path, file, regions, memory)
        if not regions:
            return None
        number, outcome = next(self.numbers), Future[tuple[str, int, str]]()
        data = pickle.dumps([(*region[:3], tuple(map(tuple, region.parts))) for region in regions])
        with self.lock:
            if self.ended.is_set():
                raise StorageError(ENDED)
            link = self._link()
            self.waiting[number] = outcome
            header = HEADER.pack(number, len(data))
            try:
                sent = socket.send_fds(link, [header], [file.fileno()])
                link.sendall(header[sent:] + data)
            except OSError:
                self.waiting.pop(number, None)
                raise StorageError(CHILD_ENDED) from None
        word, code, text = outcome.result()
        if word == "damaged":
            raise checksum_error(path)
        if word == "ended":
            raise StorageError(text)
        if word:
            raise OSError(code, text)
        return None

    def stop(self) -> None:
        """Ends the child. Reads that are under way fail."""
        super().stop()
        with self.lock:
            link, child = self.link, self.child
            if link is not None:
                link.shutdown(socket.SHUT_RDWR)
        if child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(LONGEST_END_S)
            if child.poll() is None:
                child.kill()

    def _link(self) -> socket.socket:
        """The socket of a running child. Raises OSError if none can be started."""
        if self.link is None:
            link, theirs = socket.socketpair()
            shared = self.shared
            given = (theirs.fileno(), shared.descriptor)
            rate = self.limit.bytes_per_s or 0
            arguments = [*map(str, given), str(shared.nbytes), str(int(self.populate)), str(rate)]
            with theirs:
                # -P: this package's modules do not hide the standard library's.
                command = [sys.executable, "-P", region_reads.__file__, *arguments]
                self.child = subprocess.Popen(command, pass_fds=given, stdin=subprocess.DEVNULL)
            self.link = link
            threading.Thread(target=self._receive, args=(link,), name="kvmem-reader", daemon=True).start()
        return self.link

    def _receive(self, link: socket.socket) -> None:
        """Hands each answer to its read, until the child ends."""
        with contextlib.suppress(OSError, EOFError), link.makefile("rb") as stream:
            while start := stream.read(HEADER.size):
                number, nbytes = HEADER.unpack(start)
                self.waiting.pop(number).set_result(pickle.loads(stream.read(nbytes)))
        with self.lock:
            left, self.waiting, self.link = self.waiting, {}, None
            link.close()
        text = ENDED if self.ended.is_set() else CHILD_ENDED
        for outcome in left.values():
            with contextlib.suppress(InvalidStateError):
                outcome.set_result(("ended", 0, text))
