"""Saves blocks to files on threads of its own, while the engine goes on; used in a worker."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvmem.cache import KVCacheItem
from kvmem.errors import StorageError

LONGEST_STOP_S = 20.0
"""How long the end of an engine waits for files."""


@dataclass(frozen=True)
class SaveDone:
    """A stage of a background save that has ended on one rank."""

    name: str
    """Of the file."""
    is_written: bool
    """False: the blocks are copied to host memory and may be used again. True: the save has ended."""
    seconds: float = 0.0
    """What the file took to write."""
    error: str = ""
    """Why there is no file; "" if there is one."""


class BackgroundSaves:
    """A thread for each save. `start` and `take_done` are for the engine's thread, which never waits for a file."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.done: list[SaveDone] = []
        self.under_way = 0

    def start(self, name: str, copied: Callable[[], KVCacheItem], write: Callable[[KVCacheItem], None]) -> None:
        """copied: copies the blocks to host memory. write: writes the file, or raises StorageError."""
        with self.changed:
            self.under_way += 1
        threading.Thread(target=self._run, args=(name, copied, write), name="kvmem-save", daemon=True).start()

    def fail(self, name: str, reason: str) -> None:
        """Reports a save that can't begin."""
        self._add(SaveDone(name, False))
        self._add(SaveDone(name, True, 0.0, reason))

    def take_done(self) -> list[SaveDone]:
        """The stages that have ended since the last call."""
        with self.changed:
            done, self.done = self.done, []
        return done

    def stop(self) -> None:
        """Waits until all files are written."""
        with self.changed:
            self.changed.wait_for(lambda: not self.under_way, LONGEST_STOP_S)

    def _add(self, done: SaveDone) -> None:
        with self.changed:
            self.done.append(done)

    def _run(self, name: str, copied: Callable[[], KVCacheItem], write: Callable[[KVCacheItem], None]) -> None:
        is_copied, seconds, error = False, 0.0, "Saving it failed unexpectedly. The engine's log says why."
        try:
            item = copied()
            self._add(SaveDone(name, False))
            is_copied, started = True, time.perf_counter()
            write(item)
            seconds, error = time.perf_counter() - started, ""
        except StorageError as failure:
            error = str(failure)
        finally:  # whatever happens, the scheduler hears of the end
            if not is_copied:
                self._add(SaveDone(name, False))
            with self.changed:
                self.under_way -= 1
                self.done.append(SaveDone(name, True, seconds, error))
                self.changed.notify_all()
