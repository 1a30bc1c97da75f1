"""MemScheduler: keeps text memories as KV ahead of the queries that will use them."""

from __future__ import annotations

import asyncio
import logging
import threading
import warnings
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Self
from weakref import WeakValueDictionary

from kvmem.cache import CacheView, DialogueMemoryItem, KeptPrefix, MemoryTokens, Message, TextualMemoryItem
from kvmem.config import check_namespace
from kvmem.engines import Generation, Sampling, Token, check_generation
from kvmem.engines.huggingface import HFBackend
from kvmem.engines.vllm import FileView
from kvmem.errors import (
    ArgumentError,
    BudgetError,
    BuildCancelled,
    ChangedFileError,
    ClosedError,
    ConfigError,
    KVMemError,
    KVMemWarning,
    StorageError,
    UnknownMemoryError,
    check_kind,
)
from kvmem.memory import KVCacheMemory
from kvmem.prompt import Query
from kvmem.scheduler import engines
from kvmem.scheduler.backoff import RetryBackoff
from kvmem.scheduler.build_gate import BuildGate
from kvmem.scheduler.calibration import RECENT, Calibration, CalibrationFile, calibrated, validity
from kvmem.scheduler.cost_model import Costs, LoadEstimator
from kvmem.scheduler.dialogues import turns_of
from kvmem.scheduler.engines import View
from kvmem.scheduler.events import EventKind, EventLog, EventStream
from kvmem.scheduler.groups import group_id, is_about
from kvmem.scheduler.journal import Journal
from kvmem.scheduler.kv_index import KVIndex, Texts
from kvmem.scheduler.lifetimes import Lifetimes
from kvmem.scheduler.namespaces import in_namespace, qualified, shown
from kvmem.scheduler.observations import ObservationQueue, TextMemories, text_memories_of
from kvmem.scheduler.planner import Move, Planner, check_budgets
from kvmem.scheduler.policies import Policy
from kvmem.scheduler.policies import policy as policy_by_name
from kvmem.scheduler.prefix_selection import PrefixSelector
from kvmem.scheduler.stats import AnswerCounts, MemoryInfo, SchedulerStats, TierStats
from kvmem.storage import namespace_folder
from kvmem.tiers import ORPHANS_AFTER_S, TieredCache

logger = logging.getLogger(__name__)

CANCEL_AGAIN_S = 0.05
MOST_WAITING = 4
"""So many answers' KV, a copy in the model's memory, waits at most for the thread that keeps it."""


@dataclass(eq=False)
class _Answering:
    """An answer that runs."""

    forgotten: set[str] = field(default_factory=set)
    """The memories that were forgotten since it began."""
    edited: set[str] = field(default_factory=set)
    """The memories whose text was set anew since it began: its own text is an older one."""
    kept: KeptPrefix | None = None
    is_computed: bool = False

    def computed(self, cache: View) -> None:
        """Its prompt was computed with this view."""
        self.kept, self.is_computed = cache.kept, True


class MemScheduler:
    """observe -> tick (count, plan, execute) -> answer.

    A memory that can't be built is answered as text, and `failures` says why.
    """

    def __init__(
        self,
        memory: KVCacheMemory,
        policy: Policy | str,
        budget: Mapping[str, int],
        folder: str | Path | None = None,
        costs: Costs | None = None,
        max_builds: int = 1,
        cold: str | None = None,
        orphans_after_s: float = ORPHANS_AFTER_S,
        admit_misses: bool = True,
    ) -> None:
        """budget: bytes by tier, fastest first (`gpu`, `ram`, `disk`, `cold`). The tiers `disk_int8` and `disk_int4`
        are lossy, and answers say so. folder: for the state and the disk tiers; None: the state ends with the process.
        With a namespace, a folder of that name in it is used, and likewise at the URL of the cold tier.
        costs: prefill and load times, which then stay as given; None: those that the folder holds for this model,
        engine and machine, or else measured now, which takes some seconds. Every prefill and load corrects them.
        max_builds: at most so many builds in a tick. cold: the URL of the cold tier. orphans_after_s: a file of an
        earlier process that can't be used, because it is damaged or another model's, is deleted so many seconds after
        this scheduler was opened, by the monotonic clock.
        admit_misses: keep the KV that an answer computed where it is worth its bytes; False: builds alone fill tiers.

        Raises ArgumentError for an argument of the wrong type, ConfigError for a bad value, and StorageError if the
        folder can't be used.
        """
        for name, given, kinds in (
            ("memory", memory, (KVCacheMemory,)),
            ("policy", policy, (Policy, str)),
            ("budget", budget, (Mapping,)),
            ("folder", folder, (str, PathLike, type(None))),
            ("costs", costs, (Costs, type(None))),
            ("max_builds", max_builds, (int,)),
            ("cold", cold, (str, type(None))),
            ("admit_misses", admit_misses, (bool,)),
        ):
            way_out = "Give bytes by tier, fastest first: {'ram': 1 << 30}." if name == "budget" else ""
            check_kind(f"MemScheduler's {name}", given, *kinds, way_out=way_out)
        if max_builds < 0:
            raise ConfigError(f"max_builds is {max_builds}. Give 0 or more.")
        if memory.config.compaction is not None:
            raise ConfigError(
                f"The memory's config compacts by {memory.config.compaction.name}, and MemScheduler plans with "
                "memories that have an entry for each token. Leave compaction out. The tiers disk_int8 and disk_int4 "
                "take fewer bytes."
            )
        self.backend = engines.checked(memory.backend)
        if namespace := memory.config.namespace:  # its state and its KV apart from those of other namespaces
            own = namespace_folder(namespace)
            folder = None if folder is None else Path(folder) / own
            cold = None if cold is None else f"{cold.rstrip('/')}/{own}"
        chosen = policy_by_name(policy) if isinstance(policy, str) else policy
        check_budgets(budget)
        self.namespace = namespace
        self.failures, self.lifetimes = RetryBackoff(), Lifetimes()
        self._events, self._answered = EventLog(namespace), AnswerCounts()
        with ExitStack() as opened:  # if the state can't be used, the folders are left to the next scheduler
            self.journal = Journal(Path(folder)) if folder is not None else None
            if self.journal is not None:
                opened.enter_context(closing(self.journal))
            self.items = TieredCache(
                self.backend, budget, None if folder is None else Path(folder) / "kv", cold, orphans_after_s
            )
            opened.enter_context(closing(self.items))
            self.calibration: Calibration | None = None
            self._calibration_file: CalibrationFile | None = None
            if costs is None:
                if self.journal is not None:
                    self._calibration_file = CalibrationFile(self.journal.folder, validity(self.backend), cold)
                    self._calibration_file.restore(self.items.loads, self.items.writes)
                self.calibration = calibrated(self.backend, self._calibration_file)
                costs = self.calibration.costs
            self.index = KVIndex(self.backend, self.items, memory.config.separator, namespace, self._dropped)
            self.loads = loads = LoadEstimator(costs, self.items.loads)
            self.planner = Planner(chosen, budget, costs, self.items.size, loads)
            self.prefix_selector = PrefixSelector(self.index, loads, self._events)
            self.observations = ObservationQueue(self.planner, self.index, self.failures, self.journal, self.lifetimes)
            self.index.adopt()
            opened.pop_all()
        self._keep_calibration()
        self.builds = self.cancelled_builds = self.admissions = self.spilled = 0
        self.build_s = 0.0
        self.failed_ticks, self.last_failed_tick = 0, ""
        """Ticks of the thread that ended in an error, and the last error. The thread continues."""
        self.gate = BuildGate()
        self._max_builds, self._admit_misses = max_builds, admit_misses
        self._moving: list[str] = []
        """The memories and groups that builds, moves and admissions run for."""
        self._moved = threading.Condition()
        self._forgetting = 0
        """Running calls of `forget`, during which no build, move or admission starts."""
        self._answers: list[_Answering] = []
        """The running answers."""
        self._turns: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()
        """By dialogue, held while a turn of it is answered."""
        self._kept: deque[tuple[list[TextualMemoryItem], KeptPrefix]] = deque()
        """What answers computed, for the thread of `start` to keep."""
        self.skipped_admissions = 0
        """What was not kept because the thread had not kept enough of what came before."""
        self._ticking, self._admitting = threading.Lock(), threading.Lock()
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._last_admissions_in: int | None = None
        """The thread that closes the scheduler, while it keeps what answers have left."""

    def observe(
        self, memories: TextMemories, query: Query, cache: View | None = None, namespace: str | None = None
    ) -> None:
        """Records that a query used this text memory, or these in this order. Returns at once; `tick` does the rest.

        Memories that are often used together in one order are planned as a group with joint KV.

        cache: the view of these memories, from `view`, that answered the query. The KV that the answer computed is then
        kept where it is worth its bytes, as `answer` does. Writing it takes time, on a disk tier in particular.
        namespace: as in `answer`. A memory whose time to live is over is not observed.
        """
        used = self._given(memories, namespace)
        check_kind("cache", cache, CacheView, FileView, type(None), way_out="Give the view that answered the query.")
        self._check_open()
        if self._over(used):
            return
        self._observe(used, query)
        if cache is not None:
            self._keep(used, cache.kept)

    def _observe(self, used: list[TextualMemoryItem], query: Query) -> None:
        self.backend.template.check_query(query)
        text = query if isinstance(query, str) else "\n".join(turn["content"] for turn in query)
        query_tokens = len(self.backend.tokenizer(text, add_special_tokens=False).input_ids)
        for changed in self.observations.use(used, query_tokens):
            self._text_changed(changed)
        self._wake.set()

    def _given(self, memories: TextMemories, namespace: str | None) -> list[TextualMemoryItem]:
        """Copies of these memories under this scheduler's ids."""
        return in_namespace(text_memories_of(memories), namespace, self.namespace)

    def _id(self, memory_id: str, namespace: str | None) -> str:
        """This scheduler's id of a memory."""
        check_kind("A memory's id", memory_id, str, way_out="Give the id of a text memory.")
        return qualified(memory_id, namespace, self.namespace)

    def update(self, text_memories: TextMemories, ttl_s: float | None = None, namespace: str | None = None) -> None:
        """Sets the text of a memory, or of several. KV of the old text is no longer served, and a running build of it
        is cancelled.

        If a text is replaced, nothing of the old one is left in a file afterwards: its KV is deleted and the state is
        written, once for each call. An old text that `answer` or `observe` replaced is gone after the next tick.
        Raises StorageError if the state can't be written. The text is set all the same, and the next tick tries again.

        ttl_s: the memory ends so many seconds from now: it is then forgotten, and neither served nor kept when it is
        used again, until another `update`. None: it has no end. namespace: as in `answer`.
        """
        given = self._given(text_memories, namespace)
        end = self.lifetimes.deadline(ttl_s)
        self._check_open()
        self._expire()
        for memory in given:
            self.observations.end_at(memory.id, end)
        changed = [memory.id for memory in given if self.observations.set_text(memory)]
        for memory_id in changed:
            self._text_changed(memory_id)
        self._wake.set()
        if self.observations.holds_outdated:
            self._wait_while(lambda moving: any(is_about(moving, memory_id) for memory_id in changed))
            self.index.drop_outdated()
            self.observations.snapshot()

    def pin(self, memory_id: str, ttl_s: float | None = None, namespace: str | None = None) -> None:
        """Keeps a memory's KV before everything that the policy ranks, for `ttl_s` seconds (None: until `unpin`).

        If it is not built, the next ticks build it. Pins survive a restart. Raises UnknownMemoryError.
        """
        id_, until = self._id(memory_id, namespace), self.lifetimes.deadline(ttl_s)
        self._check_open()
        self._expire()
        self._check_known(id_, memory_id)
        self.observations.pin(id_, until)
        self._wake.set()

    def unpin(self, memory_id: str, namespace: str | None = None) -> bool:
        """Ends a pin: the policy decides again. Whether the memory was pinned."""
        self._check_open()
        return self.observations.unpin(self._id(memory_id, namespace))

    def _check_known(self, id_: str, memory_id: str) -> None:
        if id_ not in self.index.texts and id_ not in self.index.groups.members:
            raise UnknownMemoryError(f"Never observed: {memory_id}. Observed: {len(self.index.texts)} memories.")

    def _over(self, used: Sequence[TextualMemoryItem]) -> list[str]:
        """The memories of these whose time to live is over. They are forgotten, if they are not yet."""
        over = [memory.id for memory in used if self.lifetimes.is_over(memory.id)]
        if over:
            self._expire()
        return over

    def _expire(self) -> None:
        """Forgets the memories whose time to live is over."""
        for id_ in self.lifetimes.over():
            if id_ not in self.index.texts or self._closing.is_set():
                continue
            self._events.add("expired", id_)
            try:
                _, left = self._forget(id_, expired=True)
            except StorageError as error:
                left = [str(error)]
            if left:
                logger.warning("%s is expired, but its files are not deleted yet: %s", id_, "; ".join(left))

    def forget(self, memory_id: str, namespace: str | None = None) -> bool:
        """Removes a memory: its text, its KV in every tier, the groups with it, their KV, and all counts, in memory and
        in files. When it returns, no file of the scheduler or its tiers holds the text.

        A running build is cancelled. Answers that use the memory's KV at this moment finish, and are not observed.
        Returns whether the memory was known. Raises StorageError if a file can't be deleted or written now; the rest is
        done then, and each tick, or another call, tries again.
        """
        id_ = self._id(memory_id, namespace)
        self._check_open()
        removed, left = self._forget(id_)
        if left:
            raise StorageError(
                f"{memory_id} is forgotten, but its KV can't be deleted now: {'; '.join(left)}. Each tick tries again."
            )
        return bool(removed)

    def _forget(self, memory_id: str, expired: bool = False) -> tuple[list[str], list[str]]:
        """The removed ids, and what could not be deleted yet. expired: that its time is over stays known."""
        with self._moved:
            self._forgetting += 1
            for answering in self._answers:
                answering.forgotten.add(memory_id)
        try:
            for waiting in list(self._kept):
                if any(memory.id == memory_id for memory in waiting[0]):
                    with suppress(ValueError):  # the thread took it: then its text is not known any more
                        self._kept.remove(waiting)
            removed = self.observations.forget(memory_id, expired)
            self._wait_while(lambda moving: True)
            self.index.drop_outdated()
            self.prefix_selector.forget([memory_id, *removed])
            left = self.items.erase_memories(lambda id_: is_about(id_, memory_id))
            self.observations.snapshot()
        finally:
            with self._moved:
                self._forgetting -= 1
        return removed, left

    def _text_changed(self, memory_id: str) -> None:
        """Cancels a build of the old text. The answers that run do not set it again."""
        with self._moved:
            for answering in self._answers:
                answering.edited.add(memory_id)
        self._cancel_build_of(memory_id)

    def _cancel_build_of(self, changed: str) -> None:
        if any(is_about(moving, changed) for moving in list(self._moving)):
            self.gate.cancel()

    def _wait_while(self, concerns: Callable[[str], bool]) -> None:
        """Waits while a build or a move runs whose memory or group `concerns` the caller. A build is cancelled, again
        and again: one that just begins overhears it, and one that waits for a request would wait for the caller."""
        with self._moved:
            while any(map(concerns, self._moving)):
                self.gate.cancel()
                self._moved.wait(CANCEL_AGAIN_S)

    def answer(
        self,
        query: Query,
        text_memories: TextMemories,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        namespace: str | None = None,
    ) -> Generation:
        """Answers with the stored prefix that saves most, prefills the rest as text, and observes the use.

        KV of the memories that the answer had to compute is kept where it is worth its bytes: no second prefill is
        needed for it. If stored KV was not loaded, for example because prefilling is faster, the answer's `note` says
        so. If the KV comes from a quantized tier, `lossy` names its form.

        namespace: the memories' own; None: that of the KVCacheMemory. Equal ids of two namespaces are two memories, and
        one is never answered with the other's KV.
        """
        used = self._given(text_memories, namespace)
        with self._answering(used, [query]) as answering:
            try:
                with self._view(used) as cache:
                    generation = engines.generate(self.backend, query, cache, max_new_tokens, sampling)
                    answering.computed(cache)
            except ChangedFileError as error:  # while it was read; its KV is dropped
                with self._text_view(used, error) as cache:
                    generation = engines.generate(self.backend, query, cache, max_new_tokens, sampling)
                    answering.computed(cache)
        return generation

    def stream(
        self,
        query: Query,
        text_memories: TextMemories,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        namespace: str | None = None,
    ) -> Generator[Token, None, None]:
        """The answer that `answer` gives, token by token; together their texts are its text.

        Nothing runs before the first token is asked for. Builds wait until the stream is finished or closed. A stream
        that is closed early counts as a use, and what it computed is kept.
        """
        used = self._given(text_memories, namespace)
        check_generation(max_new_tokens, sampling)
        self.backend.template.check_query(query)
        return self._stream(used, query, max_new_tokens, sampling)

    def _stream(
        self, used: list[TextualMemoryItem], query: Query, max_new_tokens: int, sampling: Sampling | None
    ) -> Generator[Token, None, None]:
        with self._answering(used, [query]) as answering:
            try:
                with self._view(used) as cache:
                    for token in engines.stream(self.backend, query, cache, max_new_tokens, sampling):
                        answering.computed(cache)
                        yield token
                    answering.computed(cache)
            except ChangedFileError as error:
                if answering.is_computed:
                    raise
                with self._text_view(used, error) as cache:
                    for token in engines.stream(self.backend, query, cache, max_new_tokens, sampling):
                        answering.computed(cache)
                        yield token
                    answering.computed(cache)

    def answer_batch(
        self,
        queries: Sequence[Query],
        text_memories: TextMemories,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        namespace: str | None = None,
    ) -> list[Generation]:
        """Answers each query with the same memories, as `answer` does, and observes each as a use.

        If the memories are not stored yet, the first answer computes and keeps them for the others. `hf_graph` then
        decodes all together; `huggingface` answers one after another.
        """
        check_kind("queries", queries, list, tuple, way_out="For one query, use answer.")
        used = self._given(text_memories, namespace)
        check_generation(max_new_tokens, sampling)
        for query in queries:
            self.backend.template.check_query(query)
        answers: list[Generation] = []
        while len(answers) < len(queries):
            together = None
            if self.backend.answers_together:
                together = self._answered_together(queries[len(answers) :], used, max_new_tokens, sampling)
            if together is not None:
                return answers + together
            answers.append(self.answer(queries[len(answers)], text_memories, max_new_tokens, sampling, namespace))
            self._admit_waiting()
        return answers

    def _answered_together(
        self, queries: Sequence[Query], used: list[TextualMemoryItem], max_new_tokens: int, sampling: Sampling | None
    ) -> list[Generation] | None:
        """The answers by one batch; None if a part of the memories has to be computed, and could be kept, first."""
        with self._answering(used, queries) as answering, self._view(used) as cache:
            if not isinstance(self.backend, HFBackend) or not isinstance(cache, CacheView):
                return None
            held = cache.get_seq_length()
            if held == 0 or (cache.keep is not None and held < self.index.tokens(used[0]).body_end):
                return None
            answers = self.backend.answer_batch(queries, cache, max_new_tokens, sampling)
            answering.computed(cache)
            for answer in answers:
                self._answered.add(cache.tier, answer.prompt_tokens - answer.cached_tokens, answer.cached_tokens, 0.0)
        return answers

    def chat(
        self,
        dialogue_id: str,
        query: Query,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        system: str = "",
        namespace: str | None = None,
    ) -> Generation:
        """Answers the next turn of a dialogue, whose earlier turns the scheduler keeps, in its state too.

        The KV of the earlier turns is reused as far as the chat template repeats them as they were; if it does not, the
        answer's `note` says so. system: the system turn of a dialogue that begins. The KV of a text memory of the same
        namespace and text is reused for it.

        Raises PromptError if the template takes no turns, and ArgumentError if the id is that of a text memory.
        """
        id_ = self._id(dialogue_id, namespace)
        self.backend.template.check_query(query)
        self._check_open()
        with self._moved:
            turn = self._turns.setdefault(id_, threading.Lock())
        with turn:
            known = self.index.texts.get(id_)
            if known is not None and not isinstance(known, DialogueMemoryItem):
                raise ArgumentError(f"{dialogue_id} is a text memory. Give the dialogue another id.")
            earlier: tuple[Message, ...] = ({"role": "system", "content": system},) if system else ()
            if known is not None:
                earlier = known.memory
            if earlier:
                dialogue = DialogueMemoryItem(id=dialogue_id, memory=earlier)
                generation = self.answer(query, dialogue, max_new_tokens, sampling, namespace)
            else:
                with self.gate.request():
                    generation = self.backend.generate(query, None, max_new_tokens, sampling)
            turns = (*earlier, *turns_of(query), {"role": "assistant", "content": generation.text})
            if not self._closing.is_set() and not self.lifetimes.is_over(id_):
                self.observations.set_text(DialogueMemoryItem(id=id_, memory=turns))
        return generation

    async def aanswer(
        self,
        query: Query,
        text_memories: TextMemories,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        namespace: str | None = None,
    ) -> Generation:
        """`answer` in a thread of the event loop's executor, which goes on with other tasks meanwhile."""
        return await asyncio.to_thread(self.answer, query, text_memories, max_new_tokens, sampling, namespace)

    async def astream(
        self,
        query: Query,
        text_memories: TextMemories,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        namespace: str | None = None,
    ) -> AsyncGenerator[Token, None]:
        """`stream` for `async for`. A task that is cancelled ends the stream after the token that is being computed."""
        loop, stopped = asyncio.get_running_loop(), threading.Event()
        tokens = self.stream(query, text_memories, max_new_tokens, sampling, namespace)
        found: asyncio.Queue[Token | None] = asyncio.Queue()

        def compute() -> None:
            try:
                with closing(tokens):
                    for token in tokens:
                        loop.call_soon_threadsafe(found.put_nowait, token)
                        if stopped.is_set():
                            return
            finally:
                loop.call_soon_threadsafe(found.put_nowait, None)

        computing = loop.run_in_executor(None, compute)
        try:
            while (token := await found.get()) is not None:
                yield token
            await computing
        finally:
            stopped.set()

    @contextmanager
    def _answering(self, used: list[TextualMemoryItem], queries: Sequence[Query]) -> Iterator[_Answering]:
        """An answer to these queries. If it was computed, the uses are observed and its KV is kept, unless a memory was
        forgotten meanwhile, or the scheduler closed: the answer is valid all the same. If a text was edited meanwhile,
        the uses count for the new one."""
        answering = _Answering()
        with self._moved:
            self._answers.append(answering)
        try:
            yield answering
        finally:
            with self._moved:
                self._answers.remove(answering)
            ended = any(memory.id in answering.forgotten or self.lifetimes.is_over(memory.id) for memory in used)
            if answering.is_computed and not self._closing.is_set() and not ended:
                texts = self.index.texts
                now = [texts.get(memory.id, memory) if memory.id in answering.edited else memory for memory in used]
                for query in queries:
                    self._observe(now, query)
                self._keep(used, answering.kept)

    @contextmanager
    def view(self, text_memories: TextMemories, namespace: str | None = None) -> Iterator[View]:
        """The cache that `answer` uses, valid inside the block. Builds wait meanwhile. Give it to `observe` then."""
        with self._view(self._given(text_memories, namespace)) as cache:
            yield cache

    @contextmanager
    def _text_view(self, used: list[TextualMemoryItem], error: ChangedFileError) -> Iterator[View]:
        """A view without KV for the same prompt, after a file changed while it was read."""
        with self.gate.request():
            yield self._watched(self.prefix_selector.text(used, f"Stored KV could not be read to its end: {error}"))

    def _watched(self, cache: View) -> View:
        cache.on_prefill = partial(self._prefilled, cache.tier)
        return cache

    @contextmanager
    def _view(self, used: list[TextualMemoryItem]) -> Iterator[View]:
        if over := self._over(used):
            with self.gate.request():
                yield self._watched(self.prefix_selector.text(used, f"The time to live of {', '.join(over)} is over."))
            return
        with self.gate.request(), self.prefix_selector.view(used) as cache:
            if self._admit_misses:
                cache.keep = self._to_keep(used)
            yield self._watched(cache)

    def _prefilled(self, tier: str, new: int, behind: int, seconds: float) -> None:
        """An answer computed `new` tokens behind `behind` cached ones, which came from `tier`."""
        self._answered.add(tier, new, behind, seconds)
        if self.calibration is not None:
            self.calibration.prefilled(new, behind, seconds)

    def _before_planning(self) -> None:
        """Takes over what the prefills since the last call say about their costs, and what is pinned now."""
        if self.calibration is not None:
            self.loads.costs = self.calibration.costs
        self.planner.pinned = self.lifetimes.pinned()

    def _keep_calibration(self, every: int = 0) -> None:
        """Writes the calibration, if at least `every` prefills were seen since the last time."""
        if self.calibration is not None and self._calibration_file is not None:
            self._calibration_file.write(self.calibration, self.items.loads, self.items.writes, every)

    def _to_keep(self, used: list[TextualMemoryItem]) -> MemoryTokens | None:
        """The tokens whose KV an answer keeps if it computes them; None if no tier can hold the first memory.

        A model whose cache can't be cut keeps these exactly, so they are those of one memory, or of a known group.
        """
        budgets, first = self.items.budgets, len(self.index.tokens(used[0]).token_ids)
        if not any(self.items.size(tier, first) <= most for tier, most in budgets.items()):
            return None
        group = group_id([memory.id for memory in used])
        if len(used) > 1 and self.backend.keeps_last_position and group not in self.index.groups.members:
            return None
        return self.index.joint_tokens(used)

    def _keep(self, used: list[TextualMemoryItem], kept: KeptPrefix | None) -> None:
        """Stores what an answer kept where it is worth its bytes: now, or in the thread of `start` if there is one."""
        if kept is None or not self._admit_misses:
            return
        if not self.is_ticking:
            self._admit(used, kept)
        elif len(self._kept) < MOST_WAITING:
            self._kept.append((used, kept))
            self._wake.set()
        else:
            self.skipped_admissions += 1

    def _admit_waiting(self) -> None:
        """Stores what answers have left for the thread."""
        while True:
            try:
                used, kept = self._kept.popleft()
            except IndexError:
                return
            self._admit(used, kept)

    def _admit(self, used: list[TextualMemoryItem], kept: KeptPrefix) -> None:
        """Stores what an answer kept, if the planner gives it a tier. A failure is counted, and raises nothing."""
        with self._admitting:
            for id_, tokens in self.index.kept(used, kept):
                with self.observations.counts:
                    self.observations.count()
                    self._before_planning()
                    if id_ in self.failures.barred(self.planner.table.now):
                        continue
                    lost, tiers = self.items.pending_deletes.by_tier(), self.index.tiers()
                    if (self.index.stored_tokens(id_) or 0) < len(tokens.token_ids):
                        tiers.pop(id_, None)  # a dialogue has grown: its new KV takes the place of the old
                    moves = self.planner.admit(id_, tiers, lost, self.items.write_s)
                if not moves:
                    continue
                self.index.evict(id_)
                *before, admission = moves
                assert admission.target is not None
                for move in before:
                    self._execute(move)
                texts = tuple(used[: len(self.index.members(id_))])
                self._cancel_build_of(id_)
                with self._move_of(id_) as may_move:
                    if may_move:
                        self._store_kept(id_, texts, tokens, kept, admission.target)
                return

    def _store_kept(self, id_: str, texts: Texts, tokens: MemoryTokens, kept: KeptPrefix, tier: str) -> None:
        try:
            item = self.index.kept_item(id_, texts, tokens, kept)
            if self.index.store(id_, texts, item, tier):
                self.admissions += 1
                self._events.add("admitted", id_, None, tier)
        except BudgetError:  # an item that should have left is in use
            pass
        except (KVMemError, OSError) as error:
            self._failed(id_, error)

    def tick(self) -> list[Move]:
        """Counts what was observed, plans, and executes the plan. Returns the moves that were made.

        One tick runs at a time.
        """
        with self._ticking:
            self._expire()
            self._admit_waiting()
            self.observations.count()
            if not self._closing.is_set():  # after closing, the tiers may belong to another process
                self.items.pending_deletes.retry()
                self.items.collect_orphans()
            made, lost = [], self.items.pending_deletes.by_tier()
            with self.observations.counts:
                self._before_planning()
                barred = self.failures.barred(self.planner.table.now)
                moves = self.planner.plan(self.index.tiers(), self._max_builds, barred, lost)
            for move in moves:
                if self._execute(move):
                    made.append(move)
                self._admit_waiting()
            self.prefix_selector.probe()
            self.observations.snapshot()
            self._keep_calibration(RECENT)
            return made

    def explain(self, memory_id: str, namespace: str | None = None) -> str:
        """Why a memory is in its tier, in one line with the numbers. Raises UnknownMemoryError."""
        id_ = self._id(memory_id, namespace)
        with self._ticking, self.observations.counts:
            self.observations.count()
            self._before_planning()
            self._check_known(id_, memory_id)
            tiers = self.index.tiers()
            where = f"in {tiers[id_]}" if id_ in tiers else "text"
            why = self.planner.explain(id_, tiers) + self.prefix_selector.explain(id_)
            why += self.failures.explain(id_) + self.items.pending_deletes.explain(id_)
            return f"{memory_id} is {where}. {why}"

    def list(self, namespace: str | None = None) -> list[MemoryInfo]:
        """Every memory and group, in the order in which they were first used. namespace: only those of this one; None:
        all."""
        if namespace is not None:
            check_namespace(namespace)
        with self.observations.counts:
            self.observations.count()
            stored, pinned, table = self.index.stored(), self.lifetimes.pinned(), self.planner.table
            rows = dict(table.row_of)
            counts = {
                id_: (int(table.tokens[row]), int(table.uses[row]), int(table.edits[row])) for id_, row in rows.items()
            }
        found = []
        for id_, (tokens, uses, edits) in counts.items():
            members = tuple(shown(member, self.namespace)[1] for member in self.index.members(id_))
            its_namespace, name = shown(id_, self.namespace)
            if namespace not in (None, its_namespace):
                continue
            item_id, tier = stored.get(id_, ("", None))
            nbytes, lossy = 0, ""
            if item_id:
                try:
                    nbytes, lossy = self.items.nbytes(item_id), self.items.metadata(item_id).lossy
                except UnknownMemoryError:  # dropped since
                    tier = None
            left_s = self.lifetimes.left_s(id_)
            found.append(
                MemoryInfo(
                    name, its_namespace, members, tier, tokens, nbytes, uses, edits, id_ in pinned, left_s, lossy
                )
            )
        return found

    def stats(self) -> SchedulerStats:
        """Counts since the scheduler was opened, and figures by tier."""
        tiers, answered, used = Counter(self.index.tiers().values()), self._answered, self.items.used_bytes()
        return SchedulerStats(
            hits=answered.hits.total(),
            misses=answered.misses,
            cached_tokens=answered.cached_tokens,
            computed_tokens=answered.computed_tokens,
            prefill_s=answered.prefill_s,
            builds=self.builds,
            build_s=self.build_s,
            admissions=self.admissions,
            promotions=self._events.count("promoted"),
            demotions=self._events.count("demoted"),
            evictions=self._events.count("evicted"),
            expirations=self._events.count("expired"),
            refusals=self._events.count("refused"),
            cancelled_builds=self.cancelled_builds,
            not_worth_loading=self.prefix_selector.not_worth_loading,
            tiers={
                tier: TierStats(
                    budget,
                    used[tier],
                    tiers[tier],
                    answered.hits[tier],
                    *self.items.loads.total(tier),
                    *self.items.writes.total(tier),
                )
                for tier, budget in self.items.budgets.items()
            },
        )

    def events(self) -> EventStream:
        """What happens to the memories from now on, as an iterator for a thread of its own. It ends at `close`.

        A reader that is slow delays nothing; it misses the oldest events beyond a thousand.
        """
        return self._events.stream()

    def _dropped(self, id_: str) -> None:
        self._events.add("evicted", id_, reason="a text of it changed or was forgotten")

    def start(self, interval_s: float = 0.5) -> None:
        """Starts a thread that ticks after each observation, and at least every `interval_s` seconds.

        Raises ConfigError if the interval is not positive or the thread already runs.
        """
        check_kind("interval_s", interval_s, int, float, way_out="Give seconds.")
        self._check_open()
        if not interval_s > 0 or self._thread is not None:
            why = "This scheduler ticks already" if self._thread is not None else f"interval_s is {interval_s}"
            raise ConfigError(f"{why}. Call start once, with seconds above 0.")

        def loop() -> None:
            while not self._closing.is_set():
                self._wake.wait(interval_s)
                self._wake.clear()
                if self._closing.is_set():
                    return
                try:
                    self.tick()
                except (KVMemError, OSError) as error:  # such as a full disk; the next tick plans again
                    logger.warning("A tick failed: %s", error)
                    self.failed_ticks += 1
                    self.last_failed_tick = f"{type(error).__name__}: {error}"

        self._thread = threading.Thread(target=loop, name="MemScheduler", daemon=True)
        self._thread.start()

    @property
    def is_ticking(self) -> bool:
        """Whether the thread of `start` runs."""
        return self._thread is not None and self._thread.is_alive()

    def close(self, spill: bool = True) -> None:
        """Cancels a running build, ends the thread, writes the state, and moves what is in memory to the disk or cold
        tier where the plan says that it is worth its bytes. Later calls do nothing.

        spill: False drops what is in memory, which takes no time. What an answer uses at this moment is dropped too.
        If the state or KV can't be written, a KVMemWarning says so, and what was stored before stays.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        self._wake.set()
        self.gate.cancel()
        if self._thread is not None:
            self._thread.join()
        self._wait_while(lambda moving: True)
        with self._ticking:
            self._last_admissions_in = threading.get_ident()
            self._admit_waiting()
            self._last_admissions_in = None
        with self._ticking, closing(self.items), closing(self.journal) if self.journal is not None else nullcontext():
            self.observations.count()
            self._before_planning()
            try:
                self.observations.snapshot(every=0)
                written = True
            except StorageError as error:
                written = False
                warnings.warn(f"The state was not written at close: {error}", KVMemWarning, stacklevel=2)
            if spill and self.journal is not None:  # without a state, the next scheduler knows no text of the KV
                self._spill(may_evict=written)
            self._keep_calibration()
        self._events.close()

    def _spill(self, may_evict: bool) -> None:
        """Moves what the tiers in memory hold to those that last. may_evict: replace what ranks below it there."""
        with self.observations.counts:
            moves = self.planner.spill(
                self.index.tiers(),
                self.items.lasting_tiers,
                self.items.pending_deletes.by_tier(),
                self.items.write_s,
            )
        for move in moves:
            if move.target is None and not may_evict:
                break
            try:
                if self._moved_between_tiers(move, "the scheduler closes") and move.target is not None:
                    self.spilled += move.source not in self.items.lasting_tiers
            except BudgetError:  # an item that should have left is in use
                continue
            except StorageError as error:
                warnings.warn(
                    f"What was in memory could not be kept in {move.target}: {error}", KVMemWarning, stacklevel=3
                )
                break

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise ClosedError("This scheduler is closed. Make another: with the same folder it goes on as this did.")

    def _execute(self, move: Move) -> bool:
        with self._move_of(move.memory_id) as may_move:
            return may_move and self._moved_as_planned(move)

    @contextmanager
    def _move_of(self, id_: str) -> Iterator[bool]:
        """A build, move or admission for `id_`. Gives False if none may start."""
        with self._moved:
            closed = self._closing.is_set() and self._last_admissions_in != threading.get_ident()
            if may_move := not (closed or self._forgetting):
                self._moving.append(id_)
        try:
            yield may_move
        finally:
            if may_move:
                with self._moved:
                    self._moving.remove(id_)
                    self._moved.notify_all()

    def _moved_as_planned(self, move: Move) -> bool:
        if move.source is None and move.target is not None:
            return self._build(move.memory_id, move.target)
        try:
            return self._moved_between_tiers(move)
        except BudgetError:  # an item that should have left is in use; the next tick plans again
            return False
        except StorageError as error:
            self._failed(move.memory_id, error)
            return False

    def _moved_between_tiers(self, move: Move, reason: str = "") -> bool:
        """Whether the KV was promoted, demoted or evicted. Raises BudgetError or StorageError."""
        if move.target is None:
            moved = self.index.evict(move.memory_id)
        else:
            moved = self.index.move(move.memory_id, move.target)
        if moved:
            kind: EventKind = "evicted" if move.kind == "evict" else "promoted" if move.kind == "promote" else "demoted"
            self._events.add(kind, move.memory_id, move.source, move.target, reason)
        return moved

    def _failed(self, memory_id: str, error: Exception) -> None:
        """Counts a failure, unless the memory was forgotten meanwhile."""
        with self.observations.counts:
            if memory_id in self.planner.table.row_of:
                self.failures.add(memory_id, error, self.planner.table.now)
        self._events.add("refused", memory_id, reason=f"{type(error).__name__}: {error}")

    def _build(self, memory_id: str, tier: str) -> bool:
        with self.observations.counts:
            row = self.planner.table.row_of.get(memory_id)
            if row is None:  # forgotten since it was planned
                return False
            tokens = int(self.planner.table.tokens[row])
        if self.items.size(tier, tokens) > self.items.budgets[tier] - self.items.used_bytes()[tier]:
            return False  # an item that should have left is in use; the next tick plans again
        try:
            with self.gate.build() as between_layers:
                if self._closing.is_set() or self._forgetting:
                    return False
                texts = self.index.texts_of(memory_id)
                waited = self.gate.layers_waited
                item = self.index.build(memory_id, texts, between_layers)
                if self.calibration is not None and self.gate.layers_waited == waited:
                    self.calibration.prefilled(item.metadata.token_count, 0, item.metadata.build_s)
            stored = self.index.store(memory_id, texts, item, tier)
        except BuildCancelled:
            self.cancelled_builds += 1
            return False
        except (KVMemError, RuntimeError, OSError) as error:  # RuntimeError: torch's, such as out of memory
            self._failed(memory_id, error)
            return False
        self.builds += 1
        self.build_s += item.metadata.build_s
        if stored:
            self._events.add("built", memory_id, None, tier)
        with self.observations.counts:
            self.failures.pop(memory_id, None)
        return stored
