"""Chooses the stored prefix that answers a prompt soonest, and loads none whose load would save no time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from kvmem.cache import MemoryTokens, TextualMemoryItem, dynamic_cache
from kvmem.engines.vllm import FileView, VLLMBackend
from kvmem.errors import ChangedFileError, DamagedFileError, StorageError, UnknownMemoryError
from kvmem.prompt import common_prefix
from kvmem.scheduler.cost_model import LoadEstimator
from kvmem.scheduler.dialogues import extends
from kvmem.scheduler.engines import View, text_view
from kvmem.scheduler.events import EventLog
from kvmem.scheduler.kv_index import KVIndex
from kvmem.tiers import LoadEstimate

PROBE_AFTER = 8
"""After this many declined loads of a tier, `probe` loads one item of it: the tier may be faster now."""


@dataclass(frozen=True)
class _Candidate:
    memory_id: str
    item_id: str
    load: LoadEstimate


class PrefixSelector:
    """Gives cache views of what the index holds. Thread-safe."""

    def __init__(self, index: KVIndex, loads: LoadEstimator, events: EventLog | None = None) -> None:
        self._events = events or EventLog()
        self.not_worth_loading = 0
        """How often stored KV was not loaded because prefilling its tokens is faster."""
        self.unreadable: dict[str, str] = {}
        """Memories whose KV was damaged or missing when it was needed, with the reason. It was dropped."""
        self.unreachable: dict[str, str] = {}
        """Memories whose KV could not be read when it was last needed, with the reason. It is kept."""
        self.not_a_prefix = 0
        """How often no stored KV was used although some begins as the prompt does: its states belong to its last
        token, and the prompt ends its agreement before that."""
        self.declined: dict[str, tuple[int, str]] = {}
        """By measured tier: how many loads were declined since its last load, and the item of the latest one."""
        self._index, self._items, self._backend, self._loads = index, index.items, index.backend, loads
        self._lock = threading.Lock()

    @contextmanager
    def view(self, memories: Sequence[TextualMemoryItem]) -> Iterator[View]:
        """A cache for a prompt that holds these memories in this order, valid inside the block.

        It holds the exact prefix whose load, with the prefill of the rest, takes the least time. That may be nothing;
        the prompt is the same either way. If KV that holds more of the prompt was not loaded, `note` says why.

        If the block raises ChangedFileError, because a file changed while it was read, that KV is dropped: the next
        view does not hold it.
        """
        if not memories:
            raise UnknownMemoryError("No text memory is given. Give one, or use backend.generate without a cache.")
        tokens = self._index.joint_tokens(memories)
        with ExitStack() as lease:
            chosen, cache, note = self._best(memories, tokens, lease)
            cache = cache or self._as_text(memories, tokens)
            cache.note = note
            cache.tier = chosen.load.tier if chosen is not None else ""
            try:
                yield cache
            except ChangedFileError as error:
                if chosen is not None:
                    self._read_failed(chosen.memory_id, chosen.item_id, error)
                raise

    def text(self, memories: Sequence[TextualMemoryItem], note: str) -> View:
        """A view without KV for the same prompt, all of which is prefilled. note: why nothing was loaded."""
        cache = self._as_text(memories, self._index.joint_tokens(memories))
        cache.note = note
        return cache

    def _as_text(self, memories: Sequence[TextualMemoryItem], tokens: MemoryTokens) -> View:
        return text_view(self._backend, tokens, self._index.namespace(memories[0].id))

    def _best(
        self, memories: Sequence[TextualMemoryItem], tokens: MemoryTokens, lease: ExitStack
    ) -> tuple[_Candidate | None, View | None, str]:
        """The best prefix that can be read, with the KV that it is of, and the note for it."""
        candidates, uncut, notes = self._candidates(memories, tokens)
        for candidate in candidates:
            if not candidate.load.pays:
                self._decline(candidate)
                notes.append(f"{candidate.memory_id} was not loaded: {candidate.load}.")
                continue
            with ExitStack() as own_lease:
                try:
                    prefix = self._prefix(own_lease, candidate, tokens)
                except UnknownMemoryError:  # evicted since
                    continue
                except (StorageError, OSError) as error:  # also of a file that changed after it was loaded
                    self._read_failed(candidate.memory_id, candidate.item_id, error)
                    notes.append(f"{candidate.memory_id} was not loaded: {error}")
                    continue
                self.unreachable.pop(candidate.memory_id, None)
                with self._lock:
                    self.declined.pop(candidate.load.tier, None)
                if prefix is not None:
                    lease.push(own_lease.pop_all())
                    return candidate, prefix, " ".join(notes)
        if uncut:
            with self._lock:
                self.not_a_prefix += 1
        return None, None, " ".join([*notes, *uncut])

    def _candidates(
        self, memories: Sequence[TextualMemoryItem], tokens: MemoryTokens
    ) -> tuple[list[_Candidate], list[str], list[str]]:
        """Stored KV that begins as the prompt does, notes about such KV that can't be cut to what they share, and notes
        about dialogues whose earlier turns the chat template writes in another way now.

        First, so that the note mentions it, what holds more of the prompt than the best candidate but saves no time;
        then what saves time, the most first.
        """
        candidates: list[_Candidate] = []
        uncut: list[str] = []
        rewritten: list[str] = []
        for memory_id, item_id in self._index.beginning_as(memories):
            try:
                metadata = self._items.metadata(item_id)
                stored_ids = metadata.tokens.token_ids
                shared = common_prefix(stored_ids, tokens.token_ids)
                earlier = metadata.tokens.source
                if shared < len(stored_ids) and not isinstance(earlier, str) and extends(memories[0].memory, earlier):
                    rewritten.append(
                        f"The chat template does not repeat the earlier turns of {memory_id} as they were: the prompt "
                        f"begins with {shared} of their {len(stored_ids)} stored tokens."
                    )
                if self._backend.fingerprint.keeps_states and shared < len(stored_ids):
                    uncut.append(
                        f"{memory_id} was not used: the prompt begins with {shared} of its {len(stored_ids)} tokens, "
                        "and the model's states belong to the last one."
                    )
                    continue
                candidates.append(_Candidate(memory_id, item_id, self._estimate(item_id, shared)))
            except UnknownMemoryError:  # evicted since
                continue
        paying = [candidate for candidate in candidates if candidate.load.pays]
        paying.sort(key=lambda candidate: (-candidate.load.saved_s, candidate.load.nbytes))
        most = paying[0].load.tokens if paying else 0
        return (
            [each for each in candidates if not each.load.pays and each.load.tokens > most] + paying,
            uncut,
            rewritten,
        )

    def _estimate(self, item_id: str, tokens: int) -> LoadEstimate:
        return self._loads.estimate(self._items.tier_of(item_id), self._items.nbytes(item_id), tokens)

    def _prefix(self, lease: ExitStack, candidate: _Candidate, tokens: MemoryTokens) -> View | None:
        """What the item shares with these tokens, as long as the lease lasts; None if a sliding window has dropped a
        part of it, or if that is nothing."""
        shared = candidate.load.tokens
        shared_tokens = tokens.model_copy(update={"token_ids": tokens.token_ids[:shared]})
        if isinstance(self._backend, VLLMBackend):
            handle = lease.enter_context(self._items.file(candidate.item_id))
            return FileView(shared_tokens, handle.file, handle.salt, handle.namespace) if shared else None
        item = lease.enter_context(self._items.use(candidate.item_id))
        cache_view = dynamic_cache.view_of(
            item.kv_cache, shared_tokens, self._backend.model_config, item.metadata.lossy, self._backend.fingerprint
        )
        return cache_view if shared and dynamic_cache.crop(cache_view, shared) else None

    def _decline(self, candidate: _Candidate) -> None:
        with self._lock:
            self.not_worth_loading += 1
            if self._is_measured(candidate.load.tier):
                count, _ = self.declined.get(candidate.load.tier, (0, ""))
                self.declined[candidate.load.tier] = count + 1, candidate.item_id

    def _is_measured(self, tier: str) -> bool:
        """Whether load times of the tier are measured, and neither given in the costs nor zero."""
        return tier in self._items.measured_tiers and not self._loads.is_given(tier)

    def _read_failed(self, memory_id: str, item_id: str, error: StorageError | OSError) -> None:
        """Drops KV that is damaged or missing. After any other error, such as an outage, the item is kept."""
        self._events.add("refused", memory_id, reason=f"its KV can't be read: {error}")
        if isinstance(error, DamagedFileError) or isinstance(error.__cause__, FileNotFoundError):
            self.unreadable[memory_id] = str(error)
            self._index.evict(memory_id, item_id)
        else:
            self.unreachable[memory_id] = str(error)

    def forget(self, ids: Sequence[str]) -> None:
        """Forgets why KV of these memories or groups could not be read."""
        for id_ in ids:
            self.unreadable.pop(id_, None)
            self.unreachable.pop(id_, None)

    def probe(self) -> None:
        """Loads one item of each tier that was never measured, or whose loads were declined `PROBE_AFTER` times.

        Called between requests, so that no request pays to find out how fast a tier is.
        """
        for memory_id, item_id in self._to_probe().values():
            try:
                with self._items.use(item_id):
                    self.unreachable.pop(memory_id, None)
            except UnknownMemoryError:  # evicted since
                continue
            except (StorageError, OSError) as error:
                self._read_failed(memory_id, item_id, error)

    def _to_probe(self) -> dict[str, tuple[str, str]]:
        """By tier, the (memory id, item id) to load."""
        chosen: dict[str, tuple[str, str]] = {}
        with self._lock:
            for memory_id, (item_id, tier) in self._index.stored().items():
                if not self._is_measured(tier):
                    continue
                declined, latest = self.declined.get(tier, (0, ""))
                if not self._loads.load_times.count(tier) or (declined >= PROBE_AFTER and item_id == latest):
                    chosen[tier] = memory_id, item_id
            for tier in chosen:
                self.declined.pop(tier, None)
        return chosen

    def explain(self, memory_id: str) -> str:
        """What the memory's KV has lost, and whether it pays to load it, in seconds, as the end of a sentence."""
        item_id, tier = self._index.stored().get(memory_id, ("", ""))
        if not item_id:
            return ""
        try:
            metadata = self._items.metadata(item_id)
            load = self._estimate(item_id, metadata.token_count)
        except UnknownMemoryError:  # its text changed meanwhile
            return ""
        lossy = f"; lossy: {metadata.lossy}" if metadata.lossy else ""
        if tier not in self._items.measured_tiers:
            return lossy
        measured = self._loads.load_times.count(tier)
        return f"{lossy}; {'loaded' if load.pays else 'not loaded'} when wanted: {load} ({measured} loads measured)"
