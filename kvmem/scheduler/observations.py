"""Queues observations: recorded at once in any thread, counted by the next tick, and kept through a restart."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from kvmem.cache import TextualMemoryItem
from kvmem.errors import PromptError, UnknownMemoryError, check_kind
from kvmem.scheduler.backoff import RetryBackoff
from kvmem.scheduler.journal import Journal
from kvmem.scheduler.kv_index import KVIndex
from kvmem.scheduler.planner import Planner

TextMemories = TextualMemoryItem | Sequence[TextualMemoryItem]
"""One text memory, or several in the order in which the prompt holds them."""

SNAPSHOT_EVERY = 1000
"""Events between two snapshots of the state."""


class ObservationQueue:
    """Uses and new texts.

    `use` and `set_text` may be called in any thread and return at once. Only one thread may call `count` at a time.
    """

    def __init__(self, planner: Planner, index: KVIndex, failures: RetryBackoff, journal: Journal | None) -> None:
        """Restores the state that `journal` holds."""
        self._planner, self._index, self._failures, self._journal = planner, index, failures, journal
        self._pending: deque[tuple[str, tuple[str, ...], int]] = deque()
        """(kind, memory ids, query tokens)."""
        self._lock = threading.Lock()
        if journal is not None:
            self._restore(journal)

    def use(self, memories: Sequence[TextualMemoryItem], query_tokens: int) -> list[str]:
        """A query used these memories in this order. Returns the ids whose text is new or has changed."""
        with self._lock:
            changed = [memory.id for memory in memories if self._set_text(memory)]
            self._record("use", tuple(memory.id for memory in memories), query_tokens)
        return changed

    def set_text(self, memory: TextualMemoryItem) -> bool:
        """Sets a memory's text. True if it is new or has changed."""
        with self._lock:
            return self._set_text(memory)

    def count(self) -> None:
        """Counts what was observed since the last call.

        A use of several memories counts for the KV of the first one and of each group that the prompt begins with. No
        other KV can serve it, because KV is exact only at the start of the prompt.
        """
        while self._pending:
            kind, ids, query_tokens = self._pending.popleft()
            if kind == "use":
                self._planner.used(ids[0], query_tokens)
                for group in self._index.groups.used(ids):
                    if group not in self._planner.table.row_of:
                        self._planner.joined(group, self._index.groups.heads(group))
                        self._update_length(group)
                    self._planner.used(group, query_tokens)
                continue
            for changed in (ids[0], *self._index.groups.of(ids[0])):
                if changed in self._planner.table.row_of:  # known before, so this is an edit
                    self._planner.edited(changed)
                self._failures.pop(changed, None)
                self._update_length(changed)

    def snapshot(self, every: int = SNAPSHOT_EVERY) -> None:
        """Writes the state if there were at least `every` events since the last snapshot."""
        if self._journal is None or self._journal.appended < every:
            return
        with self._lock:  # so that no event falls between the counts and the emptied journal
            self.count()
            texts = [memory.model_dump(mode="json") for memory in self._index.texts.values()]
            self._journal.snapshot(
                {
                    "planner": self._planner.state(),
                    "texts": texts,
                    "failures": self._failures.state(),
                    "groups": self._index.groups.state(),
                }
            )

    def _set_text(self, memory: TextualMemoryItem) -> bool:
        changed = self._index.set_text(memory)
        if changed:
            self._record("text", (memory.id,), 0, memory.model_dump(mode="json"))
            self._index.drop_outdated()
        return changed

    def _record(self, kind: str, ids: tuple[str, ...], query_tokens: int, memory: dict[str, Any] | None = None) -> None:
        self._pending.append((kind, ids, query_tokens))
        if self._journal is not None:
            event = {"kind": kind, "id": ids[0], "query_tokens": query_tokens, "memory": memory}
            self._journal.append(event | ({"behind": ids[1:]} if ids[1:] else {}))

    def _update_length(self, id_: str) -> None:
        try:
            tokens = len(self._index.joint_tokens(self._index.texts_of(id_)).token_ids)
        except PromptError as error:
            tokens = 0
            self._failures.add(id_, error, self._planner.table.now)
        self._planner.sized(id_, tokens)

    def _restore(self, journal: Journal) -> None:
        state, events = journal.read()
        if state is not None:
            self._planner.restore(state["planner"])
            for memory in state["texts"]:
                self._index.set_text(TextualMemoryItem(**memory))
            self._failures.update(RetryBackoff.of_state(state["failures"]))
            self._index.groups.restore(state.get("groups", {"members": [], "seen": []}))
            for group in self._index.groups.members:
                self._planner.joined(group, self._index.groups.heads(group))
        for event in events:
            if event["memory"] is not None:
                self._index.set_text(TextualMemoryItem(**event["memory"]))
            self._pending.append((event["kind"], (event["id"], *event.get("behind", ())), event["query_tokens"]))
        self.count()
        self.snapshot(every=0)


def text_memories_of(given: TextMemories) -> list[TextualMemoryItem]:
    """One memory or several, as a list of copies, so that the scheduler's texts change only by its own calls.

    Raises UnknownMemoryError if there is none, and ArgumentError for anything but text memories, or for one that was
    assigned a text or metadata that a file can't keep.
    """
    way_out = "Give TextualMemoryItem(id=..., memory=text): by its id the scheduler learns that a text was edited."
    # A pydantic model is iterable too, over its fields.
    memories = list(given) if isinstance(given, Iterable) and not isinstance(given, TextualMemoryItem) else [given]
    if not memories:
        raise UnknownMemoryError("No text memory is given. Give one, or several in their order.")
    for memory in memories:
        check_kind("What the scheduler takes", memory, TextualMemoryItem, way_out=way_out)
    return [memory.checked() for memory in memories]
