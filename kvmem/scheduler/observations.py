"""What was observed, on its way into the counts: noted at once, taken in by the next tick, kept through a restart."""

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
    """Uses and new texts. `use` and `text` are for any thread and return at once; `take_in` is for one at a time."""

    def __init__(self, planner: Planner, index: KVIndex, failures: RetryBackoff, journal: Journal | None) -> None:
        """Takes back what `journal` holds."""
        self._planner, self._index, self._failures, self._journal = planner, index, failures, journal
        self._seen: deque[tuple[str, tuple[str, ...], int]] = deque()
        self._lock = threading.Lock()
        if journal is not None:
            self._restore(journal)

    def use(self, memories: Sequence[TextualMemoryItem], query_tokens: int) -> list[str]:
        """A query used these memories, in this order; the ids of those whose text is new or has changed."""
        with self._lock:
            changed = [memory.id for memory in memories if self._hold(memory)]
            self._note("use", tuple(memory.id for memory in memories), query_tokens)
        return changed

    def text(self, memory: TextualMemoryItem) -> bool:
        """The text as it now is; True if it is new or has changed."""
        with self._lock:
            return self._hold(memory)

    def take_in(self) -> None:
        """Counts what was observed since the last time.

        A use of several memories counts for the first one's KV and for that of each group that they begin with: no
        other can serve it, for KV is exact only where it stands at the head of the prompt.
        """
        while self._seen:
            kind, ids, query_tokens = self._seen.popleft()
            if kind == "use":
                self._planner.used(ids[0], query_tokens)
                for group in self._index.groups.used(ids):
                    if group not in self._planner.table.row_of:
                        self._planner.joined(group, self._index.groups.heads(group))
                        self._size(group)
                    self._planner.used(group, query_tokens)
                continue
            for changed in (ids[0], *self._index.groups.of(ids[0])):
                if changed in self._planner.table.row_of:  # a text that was there before: an edit
                    self._planner.edited(changed)
                self._failures.pop(changed, None)
                self._size(changed)

    def snapshot(self, every: int = SNAPSHOT_EVERY) -> None:
        """Writes the state, if there are `every` events since the last time."""
        if self._journal is None or self._journal.appended < every:
            return
        with self._lock:  # nothing is noted between the counts and the new journal
            self.take_in()
            texts = [memory.model_dump(mode="json") for memory in self._index.texts.values()]
            self._journal.snapshot(
                {
                    "planner": self._planner.state(),
                    "texts": texts,
                    "failures": self._failures.state(),
                    "groups": self._index.groups.state(),
                }
            )

    def _hold(self, memory: TextualMemoryItem) -> bool:
        changed = self._index.hold(memory)
        if changed:
            self._note("text", (memory.id,), 0, memory.model_dump(mode="json"))
            self._index.free()
        return changed

    def _note(self, kind: str, ids: tuple[str, ...], query_tokens: int, memory: dict[str, Any] | None = None) -> None:
        self._seen.append((kind, ids, query_tokens))
        if self._journal is not None:
            event = {"kind": kind, "id": ids[0], "query_tokens": query_tokens, "memory": memory}
            self._journal.append(event | ({"behind": ids[1:]} if ids[1:] else {}))

    def _size(self, memory_id: str) -> None:
        try:
            tokens = len(self._index.joint_tokens(self._index.texts_of(memory_id)).token_ids)
        except PromptError as error:
            tokens = 0
            self._failures.add(memory_id, error, self._planner.table.now)
        self._planner.sized(memory_id, tokens)

    def _restore(self, journal: Journal) -> None:
        state, events = journal.read()
        if state is not None:
            self._planner.restore(state["planner"])
            for memory in state["texts"]:
                self._index.hold(TextualMemoryItem(**memory))
            self._failures.update(RetryBackoff.of_state(state["failures"]))
            self._index.groups.restore(state.get("groups", {"members": [], "seen": []}))
            for group in self._index.groups.members:
                self._planner.joined(group, self._index.groups.heads(group))
        for event in events:
            if event["memory"] is not None:
                self._index.hold(TextualMemoryItem(**event["memory"]))
            self._seen.append((event["kind"], (event["id"], *event.get("behind", ())), event["query_tokens"]))
        self.take_in()
        self.snapshot(every=0)


def text_memories_of(given: TextMemories) -> list[TextualMemoryItem]:
    """One or several, as a list. Raises UnknownMemoryError for none, and ArgumentError for what is no text memory."""
    way_out = "Give TextualMemoryItem(id=..., memory=text): by its id the scheduler learns that a text was edited."
    # a pydantic model can be gone through too, field by field
    memories = list(given) if isinstance(given, Iterable) and not isinstance(given, TextualMemoryItem) else [given]
    if not memories:
        raise UnknownMemoryError("No text memory is given. Give one, or several in their order.")
    for memory in memories:
        check_kind("What the scheduler takes", memory, TextualMemoryItem, way_out=way_out)
    return memories
