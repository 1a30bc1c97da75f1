"""Maps texts to the KV built from them, and never serves KV of another text."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from kvmem.cache import DialogueMemoryItem, KeptPrefix, KVCacheItem, KVCacheMetadata, MemoryTokens, TextualMemoryItem
from kvmem.engines import BetweenLayers
from kvmem.engines.huggingface import HFBackend
from kvmem.errors import UnknownMemoryError
from kvmem.merge import joined_tokens
from kvmem.prompt import common_prefix
from kvmem.scheduler.dialogues import extends, system_text
from kvmem.scheduler.engines import Engine
from kvmem.scheduler.groups import MAX_MEMBERS, Groups, group_id
from kvmem.scheduler.namespaces import namespace_of
from kvmem.tiers import TieredCache

Texts = tuple[TextualMemoryItem, ...]
"""What KV is built from: one text memory, or those of a group in order."""


class KVIndex:
    """The texts are authoritative: KV is kept only for exactly the texts that it was built from. Thread-safe.

    An id names a memory or a group. A group's KV is the joint KV of several memories. It becomes invalid when one of
    their texts changes.
    """

    def __init__(
        self,
        backend: Engine,
        items: TieredCache,
        separator: str,
        namespace: str = "",
        on_drop: Callable[[str], None] | None = None,
    ) -> None:
        """namespace: of the ids that name none. on_drop: called with each id whose KV is dropped because a text of it
        has changed or was forgotten."""
        self.backend, self.items = backend, items
        self._namespace, self._on_drop = namespace, on_drop
        self.texts: dict[str, TextualMemoryItem] = {}
        self.groups = Groups()
        self._separator_ids = backend.template.separator_ids(separator)
        self._tokens: dict[str, MemoryTokens] = {}
        self._stored: dict[str, str] = {}
        """Id -> kv_cache_id."""
        self._outdated: deque[str] = deque()
        """Items of texts that have changed, to be dropped."""
        self._lock = threading.Lock()

    def set_text(self, memory: TextualMemoryItem) -> bool:
        """Sets a memory's text. True if it is new or has changed; KV of the old text is then no longer served.

        A dialogue that has grown keeps its KV: that of the earlier turns. One that is given with fewer turns than it
        has keeps those that it has.

        Call `drop_outdated` afterwards to free the old KV, which may be slow. A caller that keeps a journal writes the
        new text to it in between.
        """
        with self._lock:
            known = self.texts.get(memory.id)
            if known is not None and extends(known.memory, memory.memory):
                return False
            grown = known is not None and extends(memory.memory, known.memory)
            self.texts[memory.id] = memory
            self._tokens.pop(memory.id, None)
            dropped = [] if grown else self._unstore([memory.id, *self.groups.of(memory.id)])
        self._tell(dropped)
        return True

    def _unstore(self, ids: Sequence[str]) -> list[str]:
        """Stops serving the KV of these ids, for `drop_outdated` to free. Returns those that had some."""
        dropped = [id_ for id_ in ids if id_ in self._stored]
        self._outdated.extend(self._stored.pop(id_) for id_ in dropped)
        return dropped

    def _tell(self, dropped: Sequence[str]) -> None:
        if self._on_drop is not None:
            for id_ in dropped:
                self._on_drop(id_)

    def drop_outdated(self) -> None:
        """Drops the KV of texts that have changed, and deletes its bytes even if an answer still uses it."""
        while self._outdated:
            self.items.erase(self._outdated.popleft())

    def forget(self, memory_id: str) -> list[str]:
        """Removes a memory, its groups and their KV. Returns the removed ids; none if the memory is not known."""
        with self._lock:
            removed = self.groups.forget(memory_id)
            if self.texts.pop(memory_id, None) is not None:
                removed = [memory_id, *removed]
            self._tokens.pop(memory_id, None)
            dropped = self._unstore(removed)
        self._tell(dropped)
        return removed

    def namespace(self, id_: str) -> str:
        """The namespace of a memory or group."""
        return namespace_of(id_, self._namespace)

    def members(self, id_: str) -> tuple[str, ...]:
        """The memories of a group, in order; for a memory, only itself."""
        return self.groups.members.get(id_, (id_,))

    def texts_of(self, id_: str) -> Texts:
        """The current texts of a memory or group. Raises UnknownMemoryError if one is not known."""
        try:
            return tuple(self.texts[memory_id] for memory_id in self.members(id_))
        except KeyError as error:
            raise UnknownMemoryError(f"The text of {error.args[0]} is not known.") from error

    def are_texts_of(self, id_: str, texts: Texts) -> bool:
        """Whether these are still the current texts of a memory or group, or the beginning of a dialogue."""
        current = [self.texts.get(memory_id) for memory_id in self.members(id_)]
        return len(current) == len(texts) and all(
            now is not None and extends(now.memory, text.memory) for now, text in zip(current, texts, strict=True)
        )

    def tokens(self, memory: TextualMemoryItem) -> MemoryTokens:
        """The tokens of the memory's KV. Raises PromptError for a text that can't be stored."""
        with self._lock:
            tokens = self._tokens.get(memory.id)
        if tokens is None or tokens.source != memory.memory:
            tokens = self.backend.template.memory_tokens(memory.memory)
            with self._lock:
                known = self.texts.get(memory.id)
                if known is not None and known.memory == memory.memory:
                    self._tokens[memory.id] = tokens
        return tokens

    def joint_tokens(self, memories: Sequence[TextualMemoryItem]) -> MemoryTokens:
        """The tokens of the joint KV of these memories in this order. Raises PromptError, as `tokens`."""
        tokens = [self.tokens(memory) for memory in memories]
        return tokens[0] if len(tokens) == 1 else joined_tokens(tokens, self._separator_ids)

    def build(self, id_: str, texts: Texts, between_layers: BetweenLayers | None = None) -> KVCacheItem:
        """Builds the KV of `texts` without storing it; that of a group by a joint prefill, as `Reprefill` does.

        between_layers: as in `Backend.build`.
        """
        name = namespace_of(id_, self._namespace)
        if len(texts) == 1:
            return self.backend.build(texts[0].memory, texts[0], None, between_layers, name)
        return self.backend.build_tokens(self.joint_tokens(texts), _source(id_, texts), None, between_layers, name)

    def kept(self, memories: Sequence[TextualMemoryItem], kept: KeptPrefix) -> list[tuple[str, MemoryTokens]]:
        """What KV that an answer kept can be stored as: (id, tokens) of each, the longest first.

        memories: those of the answer's prompt, in order. The KV of a group holds all its tokens. That of the first
        memory may lack the tokens that the template puts behind it, where the prompt has another text there.
        """
        found: list[tuple[str, MemoryTokens]] = []
        cut = not self.backend.keeps_last_position
        for length in range(min(len(memories), MAX_MEMBERS), 1, -1):
            group = group_id([memory.id for memory in memories[:length]])
            tokens = self.joint_tokens(memories[:length])
            shared = common_prefix(tokens.token_ids, kept.token_ids)
            whole = shared == len(tokens.token_ids) and (cut or shared == len(kept.token_ids))
            if whole and group in self.groups.members:
                found.append((group, tokens))
        tokens = self.tokens(memories[0])
        shared = common_prefix(tokens.token_ids, kept.token_ids)
        if (cut and shared >= tokens.body_end) or tokens.token_ids == kept.token_ids:
            found.append((memories[0].id, tokens.model_copy(update={"token_ids": tokens.token_ids[:shared]})))
        return found

    def kept_item(self, id_: str, texts: Texts, tokens: MemoryTokens, kept: KeptPrefix) -> KVCacheItem:
        """The KV of `texts`, as `build` gives it, from what an answer kept. Raises ModelError."""
        assert isinstance(self.backend, HFBackend)  # of another engine's answers nothing is kept
        source = texts[0] if len(texts) == 1 else _source(id_, texts)
        return self.backend.kept_item(kept, tokens, source, namespace_of(id_, self._namespace))

    def store(self, id_: str, texts: Texts, item: KVCacheItem, tier: str) -> bool:
        """Stores the KV of `texts` in `tier`. False, and nothing is stored, if a text has changed since the build.

        Raises BudgetError if it does not fit.
        """
        if not self.are_texts_of(id_, texts):
            return False
        self.items.put(item, tier)
        with self._lock:
            if not self.are_texts_of(id_, texts):
                self.items.erase(item.kv_cache_id)
                return False
            self._drop(id_)
            self._stored[id_] = item.kv_cache_id
            return True

    def heads(self, group: str) -> list[str]:
        """What the group's KV contains the KV of, shortest first. None for a model with states: they can't be cut."""
        return [] if self.backend.fingerprint.keeps_states else self.groups.heads(group)

    def beginning_as(self, memories: Sequence[TextualMemoryItem]) -> list[tuple[str, str]]:
        """(id, kv_cache_id) of stored KV that begins with the first of `memories` and contains no outdated text.

        For a dialogue with a system turn, also that of a text memory with the same text: a prompt begins alike.
        """
        first = memories[0].id
        system = system_text(memories[0])
        with self._lock:
            ids = [id_ for id_ in (first, *self.groups.of(first)) if self.members(id_)[0] == first]
            if system is not None:
                ids += [id_ for id_ in self._stored if self._is_text(id_, system, first)]
            stored = [(id_, self._stored[id_]) for id_ in ids if id_ in self._stored]
        return [(id_, item_id) for id_, item_id in stored if self._is_built_from(id_, item_id, memories)]

    def _is_built_from(self, id_: str, item_id: str, memories: Sequence[TextualMemoryItem]) -> bool:
        """Whether the item's texts are those of `memories`, as far as both name the same memories.

        The turns of a dialogue are not compared: its KV serves the tokens that the prompt begins with.
        """
        try:
            texts = self._source_texts(id_, self.items.metadata(item_id))
        except UnknownMemoryError:  # evicted since
            return False
        if isinstance(memories[0], DialogueMemoryItem):
            return True
        for member, text, memory in zip(self.members(id_), texts, memories, strict=False):
            if member != memory.id:
                break
            if text != memory.memory:
                return False
        return True

    def _is_text(self, id_: str, text: str, other: str) -> bool:
        """Whether this is a text memory of this text, in the namespace of the memory `other`."""
        known = self.texts.get(id_)
        mine, theirs = (namespace_of(each, self._namespace) for each in (id_, other))
        return known is not None and known.memory == text and mine == theirs

    def _source_texts(self, id_: str, metadata: KVCacheMetadata) -> list[object]:
        """The texts that an item was built from."""
        if id_ in self.groups.members:
            assert metadata.textual_memory is not None  # set in `build`
            return list(metadata.textual_memory.metadata.get("texts", []))
        return [metadata.tokens.source]

    def move(self, id_: str, tier: str) -> bool:
        """Moves the KV to another tier. False if it is in use or gone. Raises BudgetError or StorageError."""
        with self._lock:
            item_id = self._stored.get(id_)
        try:
            return item_id is not None and self.items.move(item_id, tier)
        except UnknownMemoryError:  # its text changed meanwhile
            return False

    def evict(self, id_: str, item_id: str | None = None) -> bool:
        """Drops the KV and keeps the text. False if there is none, or another item than `item_id` (None: any item)."""
        with self._lock:
            return item_id in (None, self._stored.get(id_)) and self._drop(id_)

    def stored(self) -> dict[str, tuple[str, str]]:
        """Id -> (kv_cache_id, tier) of all stored KV."""
        found = {}
        with self._lock:
            for id_, item_id in self._stored.items():
                with suppress(UnknownMemoryError):  # erased since
                    found[id_] = item_id, self.items.tier_of(item_id)
        return found

    def tiers(self) -> dict[str, str]:
        """Id -> tier of all stored KV."""
        return {id_: tier for id_, (_, tier) in self.stored().items()}

    def adopt(self) -> None:
        """Takes over what an earlier process left in the tiers, and drops the items of texts that have changed."""
        for item_id in self.items.ids():
            metadata = self.items.metadata(item_id)
            id_ = metadata.textual_memory.id if metadata.textual_memory else ""
            known = id_ not in self._stored and all(member in self.texts for member in self.members(id_))
            known &= metadata.namespace in ("", namespace_of(id_, self._namespace))
            if known and self._are_current(id_, metadata):
                self._stored[id_] = item_id
            else:
                self.items.drop(item_id)

    def _are_current(self, id_: str, metadata: KVCacheMetadata) -> bool:
        built_from, now = self._source_texts(id_, metadata), [text.memory for text in self.texts_of(id_)]
        return built_from == now or (len(now) == 1 and extends(now[0], metadata.tokens.source))

    def stored_tokens(self, id_: str) -> int | None:
        """How many tokens the stored KV has; None if there is none."""
        with self._lock:
            item_id = self._stored.get(id_)
        try:
            return None if item_id is None else self.items.metadata(item_id).token_count
        except UnknownMemoryError:  # erased since
            return None

    def _drop(self, id_: str) -> bool:
        item_id = self._stored.pop(id_, None)
        return item_id is not None and self.items.drop(item_id)


def _source(group: str, texts: Texts) -> TextualMemoryItem:
    """What the metadata of a group's KV state as its source."""
    return TextualMemoryItem(id=group, memory="", metadata={"texts": [text.memory for text in texts]})
