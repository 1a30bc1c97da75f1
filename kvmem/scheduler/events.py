"""What happens to the memories: counted, logged, and streamed to readers."""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal
from weakref import WeakSet

from kvmem.scheduler.namespaces import shown

logger = logging.getLogger(__name__)

EventKind = Literal["built", "admitted", "promoted", "demoted", "evicted", "expired", "refused"]


@dataclass(frozen=True)
class MemoryEvent:
    """One thing that happened to a memory or a group.

    `built` and `admitted` (kept from an answer) have a `target`, `promoted` and `demoted` a `source` and a `target`,
    `evicted` a `source`: these are tiers. `expired`: its time to live is over. `refused`: it could not be built, kept
    or moved, for this `reason`.
    """

    kind: EventKind
    memory_id: str
    namespace: str = ""
    source: str | None = None
    target: str | None = None
    reason: str = ""


MOST_WAITING = 1000
"""Events that a stream holds for its reader. Beyond that, the oldest are lost, and counted."""


class EventStream(Iterator[MemoryEvent]):
    """The events from its start on, for one reader in a thread of its own. It ends when the scheduler closes.

    A reader that is slow delays nothing: what it does not read in time is counted in `missed`.
    """

    def __init__(self, most_waiting: int = MOST_WAITING) -> None:
        self.missed = 0
        self._waiting: deque[MemoryEvent] = deque(maxlen=most_waiting)
        self._ended = False
        self._changed = threading.Condition()

    def __next__(self) -> MemoryEvent:
        """The next event. Waits for it."""
        with self._changed:
            while not self._waiting:
                if self._ended:
                    raise StopIteration
                self._changed.wait()
            return self._waiting.popleft()

    def put(self, event: MemoryEvent) -> None:
        """Adds an event for the reader."""
        with self._changed:
            self.missed += len(self._waiting) == self._waiting.maxlen
            self._waiting.append(event)
            self._changed.notify()

    def end(self) -> None:
        """Ends the stream after the events that wait."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class EventLog:
    """Counts events by kind, logs each, and adds it to the streams. Thread-safe."""

    def __init__(self, namespace: str = "") -> None:
        """namespace: of the ids that name none."""
        self._namespace = namespace
        self._counts: Counter[str] = Counter()
        self._streams: WeakSet[EventStream] = WeakSet()
        self._closed = False
        self._lock = threading.Lock()

    def stream(self) -> EventStream:
        """A stream of the events from now on. It needs no end: it is forgotten with its reader."""
        made = EventStream()
        with self._lock:
            if self._closed:
                made.end()
            self._streams.add(made)
        return made

    def count(self, kind: EventKind) -> int:
        """How many events of this kind there were."""
        with self._lock:
            return self._counts[kind]

    def add(
        self, kind: EventKind, id_: str, source: str | None = None, target: str | None = None, reason: str = ""
    ) -> None:
        """Something happened. Returns at once."""
        namespace, memory_id = shown(id_, self._namespace)
        event = MemoryEvent(kind, memory_id, namespace, source, target, reason)
        with self._lock:
            self._counts[kind] += 1
            streams = list(self._streams)
        for stream in streams:
            stream.put(event)
        level = logging.WARNING if kind == "refused" else logging.DEBUG
        logger.log(level, "%s %s%s", memory_id, kind, _details(event))

    def close(self) -> None:
        """Ends all streams."""
        with self._lock:
            self._closed = True
            streams = list(self._streams)
        for stream in streams:
            stream.end()


def _details(event: MemoryEvent) -> str:
    parts = ((" in the namespace ", event.namespace), (" from ", event.source), (" to ", event.target))
    return "".join(word + value for word, value in parts if value) + (f": {event.reason}" if event.reason else "")
