"""Queues observations: recorded at once in any thread, counted by the next tick, and kept through a restart."""

from __future__ import annotations

import json
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from pydantic import ValidationError

from kvmem.cache import DialogueMemoryItem, TextualMemoryItem
from kvmem.errors import ArgumentError, KVMemWarning, PromptError, StorageError, UnknownMemoryError, check_kind
from kvmem.scheduler.backoff import RetryBackoff
from kvmem.scheduler.dialogues import extends, text_memory
from kvmem.scheduler.journal import Journal
from kvmem.scheduler.kv_index import KVIndex
from kvmem.scheduler.lifetimes import Lifetimes
from kvmem.scheduler.planner import Planner
from kvmem.scheduler.saved_event import SavedEvent

TextMemories = TextualMemoryItem | Sequence[TextualMemoryItem]
"""One text memory, or several in the order in which the prompt holds them."""

SNAPSHOT_EVERY = 1000
"""Events between two snapshots of the state."""


class ObservationQueue:
    """Uses and new texts.

    `use` and `set_text` may be called in any thread and return at once; they never fail because of the journal.
    """

    def __init__(
        self,
        planner: Planner,
        index: KVIndex,
        failures: RetryBackoff,
        journal: Journal | None,
        lifetimes: Lifetimes,
    ) -> None:
        """Restores the state that `journal` holds. What is damaged in it is set aside with a KVMemWarning."""
        self._planner, self._index, self._failures, self._journal = planner, index, failures, journal
        self._lifetimes = lifetimes
        self._pending: deque[tuple[str, tuple[str, ...], int]] = deque()
        """(kind, memory ids, query tokens)."""
        self._outdated = False
        """Whether files of the state may still hold a text that was replaced or forgotten."""
        self.counts = threading.RLock()
        """Held by whoever reads or changes counts: planner and failures. Never held during a build or a move."""
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
        """Sets a memory's text. True if it is new or has changed; False too for a dialogue that has grown."""
        with self._lock:
            return self._set_text(memory)

    def pin(self, id_: str, until: float | None) -> None:
        """Pins a memory or a group until that time; None: without an end."""
        with self._lock:
            self._lifetimes.pin(id_, until)
            self._append({"kind": "pin", "id": id_, "until": until})

    def unpin(self, id_: str) -> bool:
        """Ends a pin. Whether there was one."""
        with self._lock:
            was_pinned = self._lifetimes.unpin(id_)
            if was_pinned:
                self._append({"kind": "unpin", "id": id_})
        return was_pinned

    def end_at(self, memory_id: str, end: float | None) -> None:
        """Sets when a memory ends; None: never."""
        with self._lock:
            if self._lifetimes.end_at(memory_id, end):
                self._append({"kind": "end", "id": memory_id, "until": end})

    def forget(self, memory_id: str, expired: bool = False) -> list[str]:
        """Removes a memory with its groups and their counts. Returns the removed ids; none if it is not known.

        expired: its time to live is over, which stays known.

        Their KV and the files of the state hold the text until `KVIndex.drop_outdated` and `snapshot`.
        """
        with self.counts, self._lock:
            self.count()
            removed = self._forget(memory_id, expired)
            self._outdated |= self._journal is not None
            self._append({"kind": "expire" if expired else "forget", "id": memory_id})
        return removed

    def _forget(self, memory_id: str, expired: bool) -> list[str]:
        removed = self._index.forget(memory_id)
        for id_ in (memory_id, *removed):
            self._planner.forget(id_)
            self._failures.pop(id_, None)
            self._lifetimes.forget(id_, keep_end=expired)
        return removed

    def _append(self, event: dict[str, Any]) -> None:
        if self._journal is not None:
            self._journal.append(event)

    def count(self) -> None:
        """Counts what was observed since the last call.

        A use of several memories counts for the KV of the first one and of each group that the prompt begins with. No
        other KV can serve it, because KV is exact only at the start of the prompt.
        """
        with self.counts:
            while self._pending:
                kind, ids, query_tokens = self._pending.popleft()
                if kind == "use":
                    self._planner.used(ids[0], query_tokens)
                    for group in self._index.groups.used(ids):
                        if group not in self._planner.table.row_of:
                            self._planner.joined(group, self._index.heads(group))
                            self._update_length(group)
                        self._planner.used(group, query_tokens)
                    continue
                for changed in (ids[0], *self._index.groups.of(ids[0])):
                    if kind == "text" and changed in self._planner.table.row_of:  # known before, so this is an edit
                        self._planner.edited(changed)
                    self._failures.pop(changed, None)
                    self._update_length(changed)

    def snapshot(self, every: int = SNAPSHOT_EVERY) -> None:
        """Writes the state if there were at least `every` events since the last snapshot, if an event could not be
        written, or if a file holds a text that was replaced or forgotten.

        Raises StorageError if the state can't be written. The next call then tries again.
        """
        journal = self._journal
        if journal is None or not (self._outdated or journal.missed or journal.appended >= every):
            return
        with self.counts, self._lock:  # so that no event falls between the counts and the emptied journal
            self.count()
            texts = [memory.model_dump(mode="json") for memory in self._index.texts.values()]
            journal.snapshot(
                {
                    "planner": self._planner.state(),
                    "texts": texts,
                    "failures": self._failures.state(),
                    "groups": self._index.groups.state(),
                    "lifetimes": self._lifetimes.state(),
                }
            )
            if self._outdated:
                journal.erase_set_aside()
            self._outdated = False

    @property
    def holds_outdated(self) -> bool:
        """Whether files of the state may still hold a text that was replaced or forgotten."""
        return self._outdated

    def _set_text(self, memory: TextualMemoryItem) -> bool:
        known = self._index.texts.get(memory.id)
        grown = known is not None and extends(memory.memory, known.memory)
        changed = self._index.set_text(memory)
        if changed:
            self._outdated |= known is not None and not grown and self._journal is not None
            self._record("grow" if grown else "text", (memory.id,), 0, memory.model_dump(mode="json"))
            self._index.drop_outdated()
        return changed and not grown

    def _record(self, kind: str, ids: tuple[str, ...], query_tokens: int, memory: dict[str, Any] | None = None) -> None:
        self._pending.append((kind, ids, query_tokens))
        event = {"kind": kind, "id": ids[0], "query_tokens": query_tokens, "memory": memory}
        self._append(event | ({"behind": ids[1:]} if ids[1:] else {}))

    def _update_length(self, id_: str) -> None:
        tokens = 0
        try:
            tokens = len(self._index.joint_tokens(self._index.texts_of(id_)).token_ids)
        except PromptError as error:
            self._failures.add(id_, error, self._planner.table.now)
        except UnknownMemoryError:  # its text was lost, or forgotten since; the next use brings it
            pass
        self._planner.sized(id_, tokens)

    def _restore(self, journal: Journal) -> None:
        state, events = journal.read()
        faults = [] if state is None else self._restore_state(state)
        if faults:
            journal.set_aside_state("; ".join(faults))
        broken = []
        for event in events:
            try:
                self._replay(SavedEvent.model_validate(event))
            except (ValidationError, ArgumentError) as error:
                broken.append((json.dumps(event).encode(), _first_line(error)))
        if broken:
            journal.set_aside_events([line for line, _ in broken], broken[0][1])
        self.count()
        for memory_id in self._lifetimes.over():  # while no scheduler ran
            self._forget(memory_id, expired=True)
        self._complete()
        try:
            self.snapshot(every=0)
        except StorageError as error:
            warnings.warn(f"{error} The next tick tries again.", KVMemWarning, stacklevel=2)

    def _restore_state(self, state: dict[str, Any]) -> list[str]:
        """Restores each part of the state that is intact. Returns what is wrong with the others."""
        faults: list[str] = []

        def part(name: str, restore: Callable[[], object]) -> None:
            try:
                restore()
            except (KeyError, TypeError, ValueError) as error:
                faults.append(f"{name} ({_first_line(error)})")

        part("planner", lambda: self._planner.restore(state["planner"]))
        texts = state.get("texts")
        for i, memory in enumerate(texts if isinstance(texts, list) else [texts]):
            part(f"text {i}", partial(self._restore_text, memory))
        part("failures", lambda: self._failures.update(RetryBackoff.of_state(state["failures"])))
        part("groups", lambda: self._index.groups.restore(state.get("groups", {"members": [], "seen": []})))
        part("lifetimes", lambda: self._lifetimes.restore(state.get("lifetimes", {"pins": {}, "ends": {}})))
        return faults

    def _restore_text(self, fields: dict[str, Any]) -> None:
        self._index.set_text(text_memory(fields))

    def _replay(self, event: SavedEvent) -> None:
        if event.kind in ("forget", "expire"):
            self.count()
            self._forget(event.id, event.kind == "expire")
            return
        if event.kind == "pin":
            self._lifetimes.pin(event.id, event.until)
            return
        if event.kind == "unpin":
            self._lifetimes.unpin(event.id)
            return
        if event.kind == "end":
            self._lifetimes.end_at(event.id, event.until)
            return
        if event.memory is not None:
            self._restore_text(event.memory)
        self._pending.append((event.kind, (event.id, *event.behind), event.query_tokens))

    def _complete(self) -> None:
        """Makes the parts fit each other where one was lost: every text and group has a row, and a row without a text
        has no length, so that it is not planned."""
        known = {*self._index.texts, *self._index.groups.members}
        for group in self._index.groups.members:
            self._planner.joined(group, self._index.heads(group))
        row_of = self._planner.table.row_of
        for id_ in [*(known - row_of.keys()), *(row_of.keys() - known)]:
            self._update_length(id_)
        for group in self._index.groups.members:
            if not all(member in self._index.texts for member in self._index.members(group)):
                self._update_length(group)
        for id_ in self._failures.keys() - known:
            del self._failures[id_]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


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
    if len(memories) > 1 and any(isinstance(memory, DialogueMemoryItem) for memory in memories):
        raise ArgumentError(
            "A dialogue is the whole memory of a prompt, and can't stand beside others. Put the texts into its first "
            "turn, as the system's."
        )
    return [memory.checked() for memory in memories]
