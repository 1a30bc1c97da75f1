"""Which files are in host memory; used in the scheduler, which decides for all ranks and keeps the one account.

The ranks obey: each holds its own heads of the same files.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from kvmem.engines.vllm.connector.file_reads import Read, ReadDone
from kvmem.engines.vllm.connector.host_memory import PAGE_BYTES
from kvmem.engines.vllm.connector.protocol import FileState, HostCacheState

READS_AT_A_TIME = 4
"""A slow file leaves the others their turns. Each read uses several threads itself."""


@dataclass
class Entry:
    """A file that is in host memory or on its way there."""

    read: Read
    pages: int
    """On each rank."""
    ordered: bool = False
    """Whether the ranks have been told to read it."""
    done: list[ReadDone] = field(default_factory=list)
    """One for each rank that has ended its read."""
    ready: bool = False
    wanted_by: set[str] = field(default_factory=set)
    """Requests that are to inject it. As long as there are any, it stays."""


class HostFiles:
    """Plans reads and evictions. A file is read once, however many requests wait for it. Where the budget is full, the
    least recently used file that no request waits for leaves."""

    def __init__(self, budget_bytes: int, ranks: int, exists: Callable[[str], bool]) -> None:
        """budget_bytes: of all ranks together. exists: whether the folder has a file of this name."""
        self.ranks = ranks
        self.exists = exists
        self.budget_pages = budget_pages(budget_bytes, ranks)
        self.entries: OrderedDict[FileState, Entry] = OrderedDict()
        """Least recently used first."""
        self.wants: dict[str, FileState] = {}
        """By request, the file that it is to inject."""
        self.failures: dict[str, tuple[FileState, str]] = {}
        """By request, the file that was not read, and why."""
        self.drops: list[FileState] = []
        """Files that the ranks are still to be told to drop."""
        self.hits = self.waits = self.reads = self.failed_reads = self.evictions = self.read_bytes = 0
        self.read_s = 0.0

    def is_ready(self, read: Read, request_id: str) -> bool:
        """Whether the file is in host memory. If not, it will be read. It stays until `release(request_id)`."""
        if self.wants.get(request_id) != read.key:
            self.release(request_id)
            self.wants[request_id] = read.key
            entry = self._entry(read)
            entry.wanted_by.add(request_id)
            self.hits += entry.ready
            self.waits += not entry.ready
        return self._entry(read).ready

    def failure(self, read: Read, request_id: str) -> str:
        """Why this file was not read for the request; "" if it was, or may be."""
        key, reason = self.failures.get(request_id, (None, ""))
        return reason if key == read.key else ""

    def prefetch(self, reads: Iterable[Read]) -> int:
        """Has files read that no request waits for yet. Returns how many of them the budget holds."""
        pages, count = 0, 0
        for read in reads:
            pages += pages_of(read.nbytes)
            if pages <= self.budget_pages:
                self._entry(read)
                count += 1
        return count

    def release(self, request_id: str) -> None:
        """The request has injected its file, or does not want it any more."""
        self.failures.pop(request_id, None)
        key = self.wants.pop(request_id, None)
        entry = None if key is None else self.entries.get(key)
        if key is not None and entry is not None:
            entry.wanted_by.remove(request_id)
            if not entry.wanted_by and not entry.ordered:
                del self.entries[key]

    def plan(self) -> tuple[list[Read], list[FileState]]:
        """The reads to start now, and the files to drop before. Files that requests wait for come first."""
        waiting = [entry for entry in self.entries.values() if not entry.ordered]
        if waiting:
            self._drop_deleted()
        under_way = sum(entry.ordered and not entry.ready for entry in self.entries.values())
        reads = []
        for entry in sorted(waiting, key=lambda entry: not entry.wanted_by):
            if under_way == READS_AT_A_TIME or not self._make_room(entry.pages):
                break
            entry.ordered = True
            under_way += 1
            reads.append(entry.read)
        drops, self.drops = self.drops, []
        return reads, drops

    def record(self, done: Iterable[ReadDone]) -> None:
        """Records the reads that have ended. A file is ready when every rank has it; one that failed on any rank is
        dropped on all, and is the failure of each request that waits for it."""
        for read_done in done:
            entry = self.entries[read_done.key]
            entry.done.append(read_done)
            if len(entry.done) < self.ranks:
                continue
            errors = [each.error for each in entry.done if each.error]
            if errors:
                self.failed_reads += 1
                for request_id in entry.wanted_by:
                    self.failures[request_id] = read_done.key, errors[0]
                self._drop(read_done.key)
            else:
                self.reads += 1
                self.read_bytes += entry.read.nbytes * self.ranks
                self.read_s += max(each.seconds for each in entry.done)
                entry.ready = True

    def state(self) -> HostCacheState:
        page_bytes = PAGE_BYTES * self.ranks
        return HostCacheState(
            budget_bytes=self.budget_pages * page_bytes,
            used_bytes=self._used_pages() * page_bytes,
            files=sum(entry.ready for entry in self.entries.values()),
            hits=self.hits,
            waits=self.waits,
            reads=self.reads,
            read_bytes=self.read_bytes,
            read_s=self.read_s,
            failed_reads=self.failed_reads,
            evictions=self.evictions,
        )

    def _entry(self, read: Read) -> Entry:
        entry = self.entries.get(read.key)
        if entry is None:
            for key in [key for key in self.entries if key[0] == read.key[0]]:
                if self.entries[key].ready and not self.entries[key].wanted_by:
                    self._drop(key)  # the file was replaced
            entry = self.entries[read.key] = Entry(read, pages_of(read.nbytes))
        self.entries.move_to_end(read.key)
        return entry

    def _make_room(self, pages: int) -> bool:
        """Evicts files until so many pages are free. A file that is larger than the budget waits for all to leave."""
        for key in [key for key, entry in self.entries.items() if entry.ready and not entry.wanted_by]:
            if self._used_pages() + pages <= self.budget_pages:
                break
            self._drop(key)
            self.evictions += 1
        used = self._used_pages()
        return used + pages <= self.budget_pages or used == 0

    def _drop_deleted(self) -> None:
        for key, entry in list(self.entries.items()):
            if entry.ready and not entry.wanted_by and not self.exists(key[0]):
                self._drop(key)

    def _drop(self, key: FileState) -> None:
        del self.entries[key]
        self.drops.append(key)

    def _used_pages(self) -> int:
        return sum(entry.pages for entry in self.entries.values() if entry.ordered)


def pages_of(nbytes: int) -> int:
    """How many pages so many bytes take."""
    return max(-(-nbytes // PAGE_BYTES), 1)


def budget_pages(nbytes: int, ranks: int) -> int:
    """How many pages each rank has, of so many bytes for all of them; at least one."""
    return max(nbytes // ranks // PAGE_BYTES, 1)
