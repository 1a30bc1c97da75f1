"""Which stored KV a prompt is answered behind: the one that saves most, and none whose load would save nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from kvmem.cache import CacheView, KVCacheItem, MemoryTokens, TextualMemoryItem, dynamic_cache
from kvmem.errors import DamagedFileError, StorageError, UnknownMemoryError
from kvmem.prompt import common_prefix
from kvmem.scheduler.cost_model import Costs
from kvmem.scheduler.kv_index import KVIndex
from kvmem.tiers import LoadEstimate

PROBE_AFTER = 8
"""So many loads of a tier that were not done, and one is done beside the requests: the tier may be faster now."""


@dataclass(frozen=True)
class _Choice:
    memory_id: str
    item_id: str
    load: LoadEstimate


class PrefixSelector:
    """Lends what the shelf holds. Thread-safe."""

    def __init__(self, shelf: KVIndex, costs: Costs) -> None:
        self.not_worth_loading = 0
        """How often stored KV was not loaded because its tier brings it no sooner than prefilling it anew."""
        self.unreadable: dict[str, str] = {}
        """Memories whose KV was found damaged or missing when wanted, with the reason; dropped, answered as text."""
        self.unreached: dict[str, str] = {}
        """Memories whose KV could not be had when last wanted, with the reason; kept, answered as text meanwhile."""
        self._shelf, self._items, self._backend, self._costs = shelf, shelf.items, shelf.backend, costs
        self._declined: dict[str, tuple[int, str]] = {}
        """By measured tier: how many loads were not done since its last one, and of which item the latest."""
        self._lock = threading.Lock()

    @contextmanager
    def view(self, memories: Sequence[TextualMemoryItem]) -> Iterator[CacheView]:
        """A cache for the prompt that holds these memories in this order, for use inside the block.

        It holds the exact prefix whose load and prefill of the rest are soonest done, which may be nothing; the prompt
        is the same either way. Its `note` says so where KV that holds more was not loaded.
        """
        if not memories:
            raise UnknownMemoryError("No text memory is given. Give one, or use backend.generate without a cache.")
        joint = self._shelf.joint(memories)
        with ExitStack() as lease:
            cache, note = self._held(memories, joint, lease)
            cache = cache or dynamic_cache.empty_view(joint, self._backend.model_config)
            cache.note = note
            yield cache

    def _held(
        self, memories: Sequence[TextualMemoryItem], joint: MemoryTokens, lease: ExitStack
    ) -> tuple[CacheView | None, str]:
        """The best prefix that could be had, and the note that goes with it."""
        choices = self._choices(memories, joint)
        told: list[str] = []
        for choice in choices:
            if not choice.load.pays:
                self._decline(choice)
                told.append(f"{choice.memory_id} was not loaded: {choice.load}.")
                continue
            try:
                item = lease.enter_context(self._items.use(choice.item_id))
            except UnknownMemoryError:  # evicted since
                continue
            except (StorageError, OSError) as error:
                self._not_had(choice.memory_id, choice.item_id, error)
                told.append(f"{choice.memory_id} was not loaded: {error}")
                continue
            self.unreached.pop(choice.memory_id, None)
            with self._lock:
                self._declined.pop(choice.load.tier, None)
            held = self._prefix(item, joint, choice.load.tokens)
            if held is not None:
                return held, " ".join(told)
        return None, " ".join(told)

    def _choices(self, memories: Sequence[TextualMemoryItem], joint: MemoryTokens) -> list[_Choice]:
        """What is stored and begins as the prompt does: what saves time, most first; before it, to be told of, what
        holds more of the prompt than the best of those and would save none."""
        choices = []
        for memory_id, item_id in self._shelf.beginning_as(memories):
            try:
                shared = common_prefix(self._items.metadata(item_id).tokens.token_ids, joint.token_ids)
                choices.append(_Choice(memory_id, item_id, self._load(item_id, shared)))
            except UnknownMemoryError:  # evicted since
                continue
        paying = [choice for choice in choices if choice.load.pays]
        paying.sort(key=lambda choice: (-choice.load.saved_s, choice.load.nbytes))
        best = paying[0].load.tokens if paying else 0
        return [choice for choice in choices if not choice.load.pays and choice.load.tokens > best] + paying

    def load_s(self, tier: str, nbytes: int) -> float:
        """As told in `costs`, else as measured; a tier that nothing was loaded from is taken to be fast."""
        told = tier in self._costs.load_s_a_byte
        return float(self._costs.load_s(nbytes, tier)) if told else self._items.loads.expected_s(tier, nbytes) or 0.0

    def _load(self, item_id: str, tokens: int) -> LoadEstimate:
        tier, nbytes = self._items.tier_of(item_id), self._items.nbytes(item_id)
        return LoadEstimate(tier, nbytes, self.load_s(tier, nbytes), tokens, float(self._costs.saved_s(tokens, 0.0)))

    def _prefix(self, item: KVCacheItem, joint: MemoryTokens, shared: int) -> CacheView | None:
        tokens = joint.model_copy(update={"token_ids": joint.token_ids[:shared]})
        cache_view = dynamic_cache.view_of(
            item.kv_cache, tokens, self._backend.model_config, item.metadata.lossy, self._backend.fingerprint
        )
        return cache_view if shared and dynamic_cache.crop(cache_view, shared) else None

    def _decline(self, choice: _Choice) -> None:
        with self._lock:
            self.not_worth_loading += 1
            if self._measured(choice.load.tier):
                count, _ = self._declined.get(choice.load.tier, (0, ""))
                self._declined[choice.load.tier] = count + 1, choice.item_id

    def _measured(self, tier: str) -> bool:
        """Whether what a load takes is found out, and not told in `costs` or nothing."""
        return tier in self._items.measured_tiers and tier not in self._costs.load_s_a_byte

    def _not_had(self, memory_id: str, item_id: str, error: StorageError | OSError) -> None:
        """Drops what is damaged or missing. Any other error may be an outage, and the item is whole after it."""
        if isinstance(error, DamagedFileError) or isinstance(error.__cause__, FileNotFoundError):
            self.unreadable[memory_id] = str(error)
            self._shelf.evict(memory_id, item_id)
        else:
            self.unreached[memory_id] = str(error)

    def probe(self) -> None:
        """Loads one item of each tier that has not been measured yet, or not while many loads were declined.

        To be called beside the requests: none of them then pays to find out that a tier is slow, or fast again.
        """
        for memory_id, item_id in self._unsure().values():
            try:
                with self._items.use(item_id):
                    self.unreached.pop(memory_id, None)
            except UnknownMemoryError:  # evicted since
                continue
            except (StorageError, OSError) as error:
                self._not_had(memory_id, item_id, error)

    def _unsure(self) -> dict[str, tuple[str, str]]:
        """By tier, the (memory id, item id) to load."""
        chosen: dict[str, tuple[str, str]] = {}
        with self._lock:
            for memory_id, (item_id, tier) in self._shelf.stored().items():
                if not self._measured(tier):
                    continue
                declined, latest = self._declined.get(tier, (0, ""))
                if not self._items.loads.count(tier) or (declined >= PROBE_AFTER and item_id == latest):
                    chosen[tier] = memory_id, item_id
            for tier in chosen:
                self._declined.pop(tier, None)
        return chosen

    def explain(self, memory_id: str) -> str:
        """What its KV has lost, and whether it is loaded when wanted, with the seconds, as the end of a sentence."""
        item_id, tier = self._shelf.stored().get(memory_id, ("", ""))
        if not item_id:
            return ""
        try:
            metadata = self._items.metadata(item_id)
            load = self._load(item_id, metadata.token_count)
        except UnknownMemoryError:  # its text changed meanwhile
            return ""
        lost = f"; lossy: {metadata.lossy}" if metadata.lossy else ""
        if tier not in self._items.measured_tiers:
            return lost
        measured = self._items.loads.count(tier)
        return f"{lost}; {'loaded' if load.pays else 'not loaded'} when wanted: {load} ({measured} loads measured)"
