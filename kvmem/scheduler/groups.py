"""Memories that are used together, one behind the other: counted, and known as a group once they were often."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

LEAST_TOGETHER = 3
"""So often memories are used together, in one order, before their joined KV is thought of."""
LONGEST = 4
"""Memories in a group, at most."""
COUNTED = 1024
"""Orders that are counted at a time; the one that was not seen for longest is forgotten first."""


def group_id(memory_ids: Sequence[str]) -> str:
    """The id under which the joined KV of these memories, in this order, is planned and kept.

    >>> group_id(["faq", "prices"])
    '["faq", "prices"]'
    """
    return json.dumps(list(memory_ids), ensure_ascii=False)


class Groups:
    """Which memories are used together, in which order. Thread-safe.

    Joined KV is a joint prefill of header + text 1 + separator + text 2 + …, and so exact for a prompt that begins with
    these texts in this order, and for no other: orders are counted apart, and each head of an order is counted as well.
    """

    def __init__(self) -> None:
        self.members: dict[str, tuple[str, ...]] = {}
        """Group id -> memory ids."""
        self._groups_of: dict[str, list[str]] = {}
        self._seen: dict[tuple[str, ...], int] = {}
        self._lock = threading.Lock()

    def used(self, memory_ids: Sequence[str]) -> list[str]:
        """One use of these memories in this order; the groups that could serve it, shortest first."""
        heads = [tuple(memory_ids[:length]) for length in range(2, min(len(memory_ids), LONGEST) + 1)]
        with self._lock:
            for head in heads:
                self._seen[head] = self._seen.pop(head, 0) + 1  # put at the end, for it was seen last
                if self._seen[head] >= LEAST_TOGETHER:
                    self._join(head)
            while len(self._seen) > COUNTED:
                del self._seen[next(iter(self._seen))]
            return [group_id(head) for head in heads if group_id(head) in self.members]

    def of(self, memory_id: str) -> list[str]:
        """The groups that a memory is in."""
        with self._lock:
            return list(self._groups_of.get(memory_id, ()))

    def heads(self, group: str) -> list[str]:
        """What a group begins with, shortest first: its first memory, then shorter groups, known or not."""
        first, *more = self.members[group]
        return [first, *(group_id([first, *more[:count]]) for count in range(1, len(more)))]

    def _join(self, memory_ids: tuple[str, ...]) -> None:
        group = group_id(memory_ids)
        if group not in self.members:
            self.members[group] = memory_ids
            for memory_id in dict.fromkeys(memory_ids):
                self._groups_of.setdefault(memory_id, []).append(group)

    def state(self) -> dict[str, Any]:
        """All of it as plain values, for a file."""
        with self._lock:
            return {"members": list(self.members.values()), "seen": list(self._seen.items())}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave."""
        with self._lock:
            for memory_ids in state["members"]:
                self._join(tuple(memory_ids))
            self._seen = {tuple(memory_ids): count for memory_ids, count in state["seen"]}
