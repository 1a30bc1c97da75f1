"""Pins and times to live of memories, as deadlines that survive a restart."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from kvmem.errors import ConfigError, check_kind

_Time = Annotated[float, Field(allow_inf_nan=False)]
_PINS = TypeAdapter(dict[str, _Time | None])
_ENDS = TypeAdapter(dict[str, _Time])


class Lifetimes:
    """Until when memories are pinned, and when they end. Thread-safe.

    Deadlines are in seconds of the clock of the day, because they outlive the process.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self._pins: dict[str, float | None] = {}
        """Id -> when its pin ends; None: never."""
        self._ends: dict[str, float] = {}
        """Id -> when the memory ends. It stays after that, so that the memory is not taken up again by its next use."""
        self._lock = threading.Lock()

    def deadline(self, ttl_s: float | None) -> float | None:
        """The time `ttl_s` seconds from now; None for None. Raises ArgumentError or ConfigError for a bad number."""
        check_kind("ttl_s", ttl_s, int, float, type(None), way_out="Give seconds, or None for no end.")
        if ttl_s is None:
            return None
        if not (ttl_s > 0 and math.isfinite(ttl_s)):
            raise ConfigError(f"ttl_s is {ttl_s}. Give seconds above 0, or None for no end.")
        return self.clock() + ttl_s

    def pin(self, id_: str, until: float | None) -> None:
        """Pins a memory or a group until that time; None: without an end."""
        with self._lock:
            self._pins[id_] = until

    def unpin(self, id_: str) -> bool:
        """Ends a pin. Whether there was one."""
        with self._lock:
            known = id_ in self._pins
            self._pins.pop(id_, None)
            return known

    def end_at(self, id_: str, end: float | None) -> bool:
        """Sets when a memory ends; None: never. Whether that changes anything."""
        with self._lock:
            if end is None:
                return self._ends.pop(id_, None) is not None
            self._ends[id_] = end
            return True

    def forget(self, id_: str, keep_end: bool = False) -> None:
        """Forgets a memory's pin and, unless `keep_end`, its end."""
        with self._lock:
            self._pins.pop(id_, None)
            if not keep_end:
                self._ends.pop(id_, None)

    def is_over(self, id_: str) -> bool:
        """Whether the memory's time to live is over."""
        with self._lock:
            return self._ends.get(id_, math.inf) <= self.clock()

    def over(self) -> list[str]:
        """All memories whose time to live is over."""
        now = self.clock()
        with self._lock:
            return [id_ for id_, end in self._ends.items() if end <= now]

    def pinned(self) -> set[str]:
        """What is pinned now."""
        now = self.clock()
        with self._lock:
            return {id_ for id_, until in self._pins.items() if until is None or until > now}

    def left_s(self, id_: str) -> float | None:
        """Seconds until the memory ends; None if it has no end."""
        with self._lock:
            end = self._ends.get(id_)
        return None if end is None else end - self.clock()

    def state(self) -> dict[str, Any]:
        """Plain values for a file."""
        with self._lock:
            return {"pins": dict(self._pins), "ends": dict(self._ends)}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`. Raises KeyError or ValueError, and restores nothing, for a state that is damaged."""
        pins, ends = _PINS.validate_python(state["pins"]), _ENDS.validate_python(state["ends"])
        with self._lock:
            self._pins, self._ends = pins, ends
