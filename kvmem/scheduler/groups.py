"""Memories that are often used together in one order: counted, and then planned as a group."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

MIN_USES_TOGETHER = 3
"""Memories become a group after this many uses together in one order."""
MAX_MEMBERS = 4
MAX_COUNTED = 1024
"""Orders that are counted at a time; the least recently seen one is forgotten first."""

_Order = Annotated[list[str], Field(min_length=2, max_length=MAX_MEMBERS)]
_MEMBERS = TypeAdapter(list[_Order])
_SEEN = TypeAdapter(list[tuple[_Order, int]])


def group_id(memory_ids: Sequence[str]) -> str:
    """The id of the joint KV of these memories in this order.

    >>> group_id(["faq", "prices"])
    '["faq", "prices"]'
    """
    return json.dumps(list(memory_ids), ensure_ascii=False)


def is_about(id_: str, memory_id: str) -> bool:
    """Whether `id_` is the memory's, or that of a group with it.

    >>> is_about('["faq", "prices"]', "prices"), is_about("faq", "prices")
    (True, False)
    """
    if id_ == memory_id:
        return True
    try:
        members = json.loads(id_)
    except (ValueError, RecursionError):
        return False
    return isinstance(members, list) and memory_id in members


class Groups:
    """Which memories are used together, and in which order. Thread-safe.

    The KV of a group is a joint prefill of header + text 1 + separator + text 2 + …. It is exact only for a prompt that
    begins with these texts in this order. So each order is counted separately, and each of its heads is counted too.
    """

    def __init__(self) -> None:
        self.members: dict[str, tuple[str, ...]] = {}
        """Group id -> memory ids."""
        self._groups_of: dict[str, list[str]] = {}
        self._uses: dict[tuple[str, ...], int] = {}
        self._lock = threading.Lock()

    def used(self, memory_ids: Sequence[str]) -> list[str]:
        """Counts one use of these memories in this order. Returns the groups that could serve it, shortest first."""
        heads = [tuple(memory_ids[:length]) for length in range(2, min(len(memory_ids), MAX_MEMBERS) + 1)]
        with self._lock:
            for head in heads:
                self._uses[head] = self._uses.pop(head, 0) + 1  # moves it to the end, as the most recently seen
                if self._uses[head] >= MIN_USES_TOGETHER:
                    self._form(head)
            while len(self._uses) > MAX_COUNTED:
                del self._uses[next(iter(self._uses))]
            return [group_id(head) for head in heads if group_id(head) in self.members]

    def of(self, memory_id: str) -> list[str]:
        """The groups that contain a memory."""
        with self._lock:
            return list(self._groups_of.get(memory_id, ()))

    def heads(self, group: str) -> list[str]:
        """What a group begins with, shortest first: its first memory, then shorter groups, whether formed or not."""
        first, *rest = self.members[group]
        return [first, *(group_id([first, *rest[:count]]) for count in range(1, len(rest)))]

    def forget(self, memory_id: str) -> list[str]:
        """Removes a memory, every group and every counted order with it. Returns the removed groups."""
        with self._lock:
            removed = self._groups_of.pop(memory_id, [])
            for group in removed:
                for other in set(self.members.pop(group)) - {memory_id}:
                    self._groups_of[other].remove(group)
            self._uses = {ids: count for ids, count in self._uses.items() if memory_id not in ids}
            return removed

    def _form(self, memory_ids: tuple[str, ...]) -> None:
        group = group_id(memory_ids)
        if group not in self.members:
            self.members[group] = memory_ids
            for memory_id in dict.fromkeys(memory_ids):
                self._groups_of.setdefault(memory_id, []).append(group)

    def state(self) -> dict[str, Any]:
        """Plain values for a file."""
        with self._lock:
            return {"members": list(self.members.values()), "seen": list(self._uses.items())}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`. Raises KeyError or ValueError, and restores nothing, for a state that is damaged."""
        members, seen = _MEMBERS.validate_python(state["members"]), _SEEN.validate_python(state["seen"])
        with self._lock:
            for memory_ids in members:
                self._form(tuple(memory_ids))
            self._uses = {tuple(memory_ids): count for memory_ids, count in seen}
