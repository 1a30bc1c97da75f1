"""What happens to the memories: counted, logged, and told to a callback."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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


OnEvent = Callable[[MemoryEvent], None]


class EventLog:
    """Counts events by kind, logs each, and calls a callback. Thread-safe."""

    def __init__(self, namespace: str = "", on_event: OnEvent | None = None) -> None:
        """namespace: of the ids that name none. on_event: called in the thread in which it happened."""
        self._namespace, self._on_event = namespace, on_event
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, kind: EventKind) -> int:
        """How many events of this kind there were."""
        with self._lock:
            return self._counts[kind]

    def add(
        self, kind: EventKind, id_: str, source: str | None = None, target: str | None = None, reason: str = ""
    ) -> None:
        """Something happened. What the callback raises is logged, so that it stops nothing."""
        namespace, memory_id = shown(id_, self._namespace)
        event = MemoryEvent(kind, memory_id, namespace, source, target, reason)
        with self._lock:
            self._counts[kind] += 1
        level = logging.WARNING if kind == "refused" else logging.DEBUG
        logger.log(level, "%s %s%s", memory_id, kind, _details(event))
        if self._on_event is not None:
            try:
                self._on_event(event)
            except Exception:  # the user's own code can raise anything
                logger.exception("The callback on_event failed for %s", event)


def _details(event: MemoryEvent) -> str:
    parts = ((" in the namespace ", event.namespace), (" from ", event.source), (" to ", event.target))
    return "".join(word + value for word, value in parts if value) + (f": {event.reason}" if event.reason else "")
