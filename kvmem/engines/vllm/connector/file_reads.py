"""Reads files into host memory on threads of its own, while the engine goes on; used in a worker."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvmem.engines.vllm.connector.host_memory import Extent
from kvmem.engines.vllm.connector.protocol import FileState
from kvmem.errors import FingerprintError, StorageError

LONGEST_STOP_S = 10.0
"""How long the end of an engine waits for reads."""


@dataclass(frozen=True)
class Read:
    """A file to bring into host memory."""

    key: FileState
    checksum: str
    """What the file's header states; another one is another file."""
    nbytes: int
    """What one rank keeps of it."""


@dataclass(frozen=True)
class ReadDone:
    """A read that has ended on one rank."""

    key: FileState
    seconds: float
    error: str = ""
    """Why it failed; "" if the file is in host memory, verified."""


class FileReads:
    """A thread for each read. `start` and `take_done` are for the engine's thread, which never waits for a file."""

    def __init__(self, read: Callable[[Read, Extent], None]) -> None:
        """read: fills the memory with the file, or raises StorageError or FingerprintError."""
        self.read = read
        self.changed = threading.Condition()
        self.done: list[ReadDone] = []
        self.under_way = 0

    def start(self, read: Read, memory: Extent) -> None:
        with self.changed:
            self.under_way += 1
        threading.Thread(target=self._run, args=(read, memory), name="kvmem-read", daemon=True).start()

    def fail(self, read: Read, reason: str) -> None:
        """Reports a read that can't begin."""
        with self.changed:
            self.done.append(ReadDone(read.key, 0.0, reason))

    def take_done(self) -> list[ReadDone]:
        """The reads that have ended since the last call."""
        with self.changed:
            done, self.done = self.done, []
        return done

    def wait(self, most_s: float) -> None:
        """Waits until a read ends, if any is under way."""
        with self.changed:
            if self.under_way and not self.done:
                self.changed.wait(most_s)

    def stop(self) -> None:
        """Waits for the end of the reads, which their reader has been told."""
        with self.changed:
            self.changed.wait_for(lambda: not self.under_way, LONGEST_STOP_S)

    def _run(self, read: Read, memory: Extent) -> None:
        started, error = time.perf_counter(), "Reading it failed unexpectedly. The engine's log says why."
        try:
            self.read(read, memory)
            error = ""
        except (StorageError, FingerprintError) as failure:
            error = str(failure)
        finally:  # whatever happens, the scheduler hears of the end
            with self.changed:
                self.under_way -= 1
                self.done.append(ReadDone(read.key, time.perf_counter() - started, error))
                self.changed.notify_all()
