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


class Throttle:
    """Limits reads to so many bytes a second, all threads together. Without a limit it only watches for the end."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self.bytes_per_s = bytes_per_s
        self.stopped = threading.Event()
        self.lock = threading.Lock()
        self.free_at = 0.0

    def wait(self, nbytes: int) -> None:
        """Waits until so many bytes may be read. Raises StorageError when the engine ends."""
        if self.bytes_per_s is not None:
            with self.lock:
                self.free_at = max(self.free_at, time.monotonic()) + nbytes / self.bytes_per_s
                pause_s = self.free_at - time.monotonic()
            self.stopped.wait(pause_s)
        if self.stopped.is_set():
            raise StorageError("The engine ends.")


class FileReads:
    """A thread for each read. `start` and `take_done` are for the engine's thread, which never waits for a file."""

    def __init__(self, read: Callable[[Read, Extent, Throttle], None], throttle: Throttle) -> None:
        """read: fills the memory with the file, or raises StorageError or FingerprintError."""
        self.read, self.throttle = read, throttle
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
        """Ends the reads at their next regions, and waits for that."""
        self.throttle.stopped.set()
        with self.changed:
            self.changed.wait_for(lambda: not self.under_way, LONGEST_STOP_S)

    def _run(self, read: Read, memory: Extent) -> None:
        started, error = time.perf_counter(), "Reading it failed unexpectedly. The engine's log says why."
        try:
            self.read(read, memory, self.throttle)
            error = ""
        except (StorageError, FingerprintError) as failure:
            error = str(failure)
        finally:  # whatever happens, the scheduler hears of the end
            with self.changed:
                self.under_way -= 1
                self.done.append(ReadDone(read.key, time.perf_counter() - started, error))
                self.changed.notify_all()
