"""Texts and the KV built from them: which KV may be served for which text, and nothing else ever is."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from kvmem import dynamic_cache
from kvmem.backends.hf import HFBackend
from kvmem.costs import Costs
from kvmem.dynamic_cache import LentCache
from kvmem.errors import StorageError, UnknownMemoryError
from kvmem.items import KVCacheItem, MemoryTokens, TextualMemoryItem
from kvmem.loads import Load
from kvmem.merge import joined_tokens
from kvmem.prompt import common_prefix
from kvmem.tiers import TieredItems

PROBE_AFTER = 8
"""So many loads of a tier that were not done, and one is done beside the requests: the tier may be faster now."""


class Shelf:
    """Text is the truth: KV is served only for the very text that it was built from, token for token. Thread-safe."""

    def __init__(self, backend: HFBackend, items: TieredItems, separator: str, costs: Costs) -> None:
        self.backend, self.items, self.costs = backend, items, costs
        self.texts: dict[str, TextualMemoryItem] = {}
        self.unreadable: dict[str, str] = {}
        """Memories whose KV was found damaged on disk when wanted, with the reason; dropped, and answered as text."""
        self.not_worth_loading = 0
        """How often a memory was answered as text because its tier brings it no sooner than prefilling it anew."""
        self._separator_ids = backend.template.separator_ids(separator)
        self._tokens: dict[str, MemoryTokens] = {}
        self._stored: dict[str, str] = {}  # memory id -> kv_cache_id
        self._declined: dict[str, list[str]] = {}  # tier -> items not loaded since its last load
        self._lock = threading.Lock()

    def hold(self, memory: TextualMemoryItem) -> bool:
        """Takes the text in; True if it is new or has changed, and then KV of the old text is gone."""
        with self._lock:
            known = self.texts.get(memory.id)
            if known is not None and known.memory == memory.memory:
                return False
            self.texts[memory.id] = memory
            self._tokens.pop(memory.id, None)
            self._forget(memory.id)
            return True

    def tokens(self, memory: TextualMemoryItem) -> MemoryTokens:
        """What the memory's KV holds, or would hold. Raises PromptError for a text that can't be stored."""
        with self._lock:
            tokens = self._tokens.get(memory.id)
        if tokens is None or tokens.source != memory.memory:
            tokens = self.backend.template.memory_tokens(memory.memory)
            with self._lock:
                if self.texts.get(memory.id) is memory:
                    self._tokens[memory.id] = tokens
        return tokens

    @contextmanager
    def lend(self, memories: Sequence[TextualMemoryItem]) -> Iterator[LentCache]:
        """A cache for the prompt that holds these memories in this order, for use inside the block.

        It holds the longest exact prefix that is stored, which may be nothing; the prompt is the same either way.
        """
        if not memories:
            raise UnknownMemoryError("No text memory is given. Give one, or use backend.generate without a cache.")
        joint = joined_tokens([self.tokens(memory) for memory in memories], self._separator_ids)
        with ExitStack() as lease:
            item, note = self._use(memories[0], lease)
            held = item and self._prefix(item, joint)
            cache = held or dynamic_cache.lend_nothing(joint, self.backend.model_config)
            cache.note = note
            yield cache

    def _use(self, memory: TextualMemoryItem, lease: ExitStack) -> tuple[KVCacheItem | None, str]:
        """The item, and else a sentence that says why it is not used, where there is one."""
        with self._lock:
            item_id = self._stored.get(memory.id)
        if item_id is None:
            return None, ""
        try:
            load = self._load(item_id)
            if not load.pays:
                self._decline(item_id, load.tier)
                return None, f"{memory.id} was not loaded: {load}."
            item = lease.enter_context(self.items.use(item_id))
        except UnknownMemoryError:  # evicted since
            return None, ""
        except StorageError as error:
            self.unreadable[memory.id] = str(error)
            self.evict(memory.id)
            return None, f"{memory.id} was not loaded: {error}"
        return (item if item.metadata.tokens.source == memory.memory else None), ""

    def _load(self, item_id: str) -> Load:
        """Its price, as told in `costs`, else as measured; a tier that nothing was loaded from is taken to be fast."""
        tier, nbytes = self.items.tier_of(item_id), self.items.nbytes(item_id)
        tokens = self.items.metadata(item_id).token_count
        told = tier in self.costs.load_s_a_byte
        load_s = self.costs.load_s(nbytes, tier) if told else self.items.loads.expected_s(tier, nbytes) or 0.0
        return Load(tier, nbytes, load_s, tokens, float(self.costs.saved_s(tokens, 0.0)))

    def _decline(self, item_id: str, tier: str) -> None:
        with self._lock:
            self.not_worth_loading += 1
            self._declined.setdefault(tier, []).append(item_id)

    def probe(self) -> None:
        """Loads one item of each tier that has not been measured yet, or not while many loads were declined.

        To be called beside the requests: none of them then pays to find out that a tier is slow, or fast again.
        """
        for memory_id, item_id in self._unsure():
            try:
                with self.items.use(item_id):
                    pass
            except UnknownMemoryError:  # evicted since
                continue
            except StorageError as error:
                self.unreadable[memory_id] = str(error)
                self.evict(memory_id)

    def _unsure(self) -> list[tuple[str, str]]:
        """(memory id, item id) to load, one at most for each tier."""
        chosen: dict[str, tuple[str, str]] = {}
        with self._lock:
            for memory_id, item_id in self._stored.items():
                tier = self.items.tier_of(item_id)
                if tier not in self.items.timed or tier in self.costs.load_s_a_byte:
                    continue
                declined = self._declined.get(tier, [])
                if not self.items.loads.count(tier) or (len(declined) >= PROBE_AFTER and item_id == declined[-1]):
                    chosen[tier] = memory_id, item_id
            for tier in chosen:
                self._declined.pop(tier, None)
        return list(chosen.values())

    def explain(self, memory_id: str) -> str:
        """Whether its KV is loaded when wanted, with the seconds, as the end of a sentence; "" where it is at hand."""
        with self._lock:
            item_id = self._stored.get(memory_id)
            if item_id is None or self.items.tier_of(item_id) not in self.items.timed:
                return ""
            load = self._load(item_id)
            measured = self.items.loads.count(load.tier)
        return f"; {'loaded' if load.pays else 'not loaded'} when wanted: {load} ({measured} loads measured)"

    def _prefix(self, item: KVCacheItem, joint: MemoryTokens) -> LentCache | None:
        shared = common_prefix(item.metadata.tokens.token_ids, joint.token_ids)
        lent = dynamic_cache.lend(
            item.kv_cache, joint.model_copy(update={"token_ids": joint.token_ids[:shared]}), self.backend.model_config
        )
        return lent if shared and dynamic_cache.crop(lent, shared) else None

    def store(self, memory: TextualMemoryItem, item: KVCacheItem, tier: str) -> bool:
        """Puts the KV of `memory` into `tier`. False, and nothing kept, if the text has changed since it was built.

        Raises BudgetError if it does not fit.
        """
        self.items.put(item, tier)
        with self._lock:
            current = self.texts.get(memory.id)
            if current is None or current.memory != memory.memory:
                self.items.drop(item.kv_cache_id)
                return False
            self._forget(memory.id)
            self._stored[memory.id] = item.kv_cache_id
            return True

    def move(self, memory_id: str, tier: str) -> bool:
        """Moves the KV to another tier; False where it is in use, or gone. Raises BudgetError or StorageError."""
        with self._lock:
            item_id = self._stored.get(memory_id)
        try:
            return item_id is not None and self.items.move(item_id, tier)
        except UnknownMemoryError:  # its text changed meanwhile
            return False

    def evict(self, memory_id: str) -> bool:
        """Forgets the KV; the text stays. False if there was none."""
        with self._lock:
            return self._forget(memory_id)

    def tiers(self) -> dict[str, str]:
        """Memory id -> tier, for the memories that have KV."""
        with self._lock:
            return {memory_id: self.items.tier_of(item_id) for memory_id, item_id in self._stored.items()}

    def adopt(self) -> None:
        """Takes up the items that an earlier process left in the tiers, and drops those whose text is another now."""
        for item_id in self.items.ids():
            metadata = self.items.metadata(item_id)
            source = metadata.textual_memory
            text = source and self.texts.get(source.id)
            if source and text and metadata.tokens.source == text.memory and source.id not in self._stored:
                self._stored[source.id] = item_id
            else:
                self.items.drop(item_id)

    def _forget(self, memory_id: str) -> bool:
        item_id = self._stored.pop(memory_id, None)
        return item_id is not None and self.items.drop(item_id)
