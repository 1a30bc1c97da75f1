"""Deletes files whose client is gone: it was killed before it could delete them. Does not import vLLM.

A client renews its lease, a file in the same folder, as long as it lives; so does each server that loads one of its
files. What counts is how long this process has seen a lease unchanged on its own monotonic clock, so neither a clock
that jumps nor another machine's clock matters.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from kvmem.engines.vllm.connector.protocol import (
    LEASE_NAME,
    MEMORY_NAME,
    NO_LEASE,
    REPORT_NAME,
    lease_name,
    renewal_s,
)

LONGEST_PAUSE_S = 60.0
"""Between two collections."""


class Orphans:
    """Collects the orphans of one folder, in a thread of its own between `start` and `stop`.

    Only files of the connector's own names are deleted: memories, their partial files, leases and reports. Several
    servers may collect in one folder.
    """

    def __init__(self, folder: Path, after_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder = folder
        self.after_s = after_s
        self.clock = clock
        self.unchanged: dict[str, tuple[int, float]] = {}
        """For each lease and report its time of change in ns (0: there is no such file), and when that was first seen,
        in seconds of the clock."""
        self.renewed: dict[str, float] = {}
        """When this server last renewed a lease."""
        self.stopped = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name="kvmem-orphans", daemon=True).start()

    def stop(self) -> None:
        self.stopped.set()

    def renew(self, name: str) -> None:
        """Renews the lease of the memory file `name`, because a request loads it. Mostly costs a look into a dict."""
        parts = MEMORY_NAME.fullmatch(name)
        if parts is None or parts["lease"] == NO_LEASE:
            return
        lease, now = parts["lease"], self.clock()
        if now - self.renewed.get(lease, -self.after_s) >= renewal_s(self.after_s):
            self.renewed[lease] = now
            with suppress(OSError):  # another user's file; its client renews it
                (self.folder / lease_name(lease)).touch()

    def collect(self) -> list[str]:
        """Deletes what is orphaned now. Returns the names. Raises OSError if the folder can't be read."""
        by_lease: dict[str, list[str]] = defaultdict(list)
        changed: dict[str, int] = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(OSError):  # it was deleted meanwhile
                    if sign := LEASE_NAME.fullmatch(entry.name):
                        changed[sign["lease"]] = entry.stat(follow_symlinks=False).st_mtime_ns
                        by_lease[sign["lease"]].append(entry.name)
                    elif memory := MEMORY_NAME.match(entry.name.removeprefix(".")):
                        if memory["lease"] != NO_LEASE:
                            by_lease[memory["lease"]].append(entry.name)
                    elif REPORT_NAME.fullmatch(entry.name):
                        by_lease[entry.name].append(entry.name)
        now = self.clock()
        before, self.unchanged = self.unchanged, {}
        self.renewed = {lease: at for lease, at in self.renewed.items() if now - at < self.after_s}
        deleted = []
        for lease, names in by_lease.items():
            state = changed.get(lease, 0)
            seen = before.get(lease)
            since = seen[1] if seen is not None and seen[0] == state else now
            if now - since < self.after_s:
                self.unchanged[lease] = state, since
                continue
            for name in names:
                with suppress(OSError):  # another server was first, or may delete it while this one may not
                    (self.folder / name).unlink()
                    deleted.append(name)
        return deleted

    def _run(self) -> None:
        while not self.stopped.wait(min(self.after_s / 4, LONGEST_PAUSE_S)):
            with suppress(OSError):  # the folder can't be read for the moment
                self.collect()
