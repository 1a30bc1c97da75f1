"""Replays a trace on a model. The scheduler answers every use, and observes, builds and evicts meanwhile."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field, replace

import numpy as np

from experiments.bench.bench import Bench
from experiments.bench.comparison import Measured, TierEvidence
from experiments.bench.judging import judging_arms
from experiments.bench.stored_kv import view_off
from experiments.measurement import Arm, Sample, Witness, embedding_of, ttft
from experiments.measurement import Trace as AnswerTrace
from experiments.results import DIRECT
from experiments.traces import Outcome, Trace
from experiments.workloads import QUESTIONS, as_query, cut_memories, docs_text
from kvmem import TextualMemoryItem
from kvmem.cache import CacheView, KVCacheItem
from kvmem.engines.huggingface import HFBackend
from kvmem.engines.vllm import FileView
from kvmem.prompt import Query, TokenizedPrompt
from kvmem.scheduler import Costs, MemScheduler

Samples = list[tuple[int, int, float]]
"""(computed tokens, cached tokens before them, seconds) of each prefill."""
MISS = "miss"


@dataclass(frozen=True, kw_only=True)
class ReplayedUse:
    """One use of a memory: what its answer computed, and its seconds from text to the first token."""

    memory_tokens: int
    new_tokens: int
    cached_tokens: int
    user_s: float
    outer_s: float
    """The clock around the call."""
    computed_tokens: int | None
    """Tokens that entered the model, by a hook outside the engine."""
    direct_s: float | None = None
    """The same prompt with nothing cached, for a use that was a hit."""


@dataclass(frozen=True, kw_only=True)
class ReplayedMove:
    """What the scheduler wrote into a tier: a build, KV that a miss computed, or a move from another tier."""

    tokens: int
    moved_bytes: int
    build_s: float | None = None
    """None for anything but a build."""
    kept_s: float | None = None
    """Of KV that a miss computed: the seconds of that prefill, which are those of the use and count once."""


@dataclass(frozen=True)
class Replayed:
    """The measurements of a replay."""

    uses: list[ReplayedUse]
    moves: list[ReplayedMove]
    trace: Trace
    """The trace with the token counts of the actual texts."""
    planning: Costs
    """The scheduler's cost model, measured before the replay."""
    measured: Measured
    """The hits, one a round, beside the arms that they are compared with."""
    items: list[KVCacheItem]
    """The items that were hit."""
    builds_s: list[float]
    """For each hit, the seconds in which its item was built."""
    tier: TierEvidence

    @property
    def samples(self) -> Samples:
        """Every prefill, for a cost model."""
        found: Samples = []
        for use in self.uses:
            found.append((use.new_tokens, use.cached_tokens, use.user_s))
            if use.direct_s is not None:
                found.append((use.new_tokens + use.cached_tokens, 0, use.direct_s))
        return found + [(move.tokens, 0, move.build_s) for move in self.moves if move.build_s is not None]

    @property
    def outcome(self) -> Outcome:
        return outcome_of(self.uses, self.moves)


def outcome_of(uses: list[ReplayedUse], moves: list[ReplayedMove]) -> Outcome:
    """What a replay amounts to, from its uses and moves alone."""
    hits = [use for use in uses if use.direct_s is not None]
    built_s = [move.build_s for move in moves if move.build_s is not None]
    return Outcome(
        np.array([use.user_s for use in uses]),
        sum((use.direct_s or 0.0) - use.user_s for use in hits),
        sum(built_s),
        len(hits),
        sum(use.memory_tokens for use in hits),
        sum(use.memory_tokens for use in uses),
        len(built_s),
        sum(move.moved_bytes for move in moves),
    )


def replay(
    bench: Bench, trace: Trace, policy: str, budget_share: float, tick_every: int, answer_tokens: int
) -> Replayed:
    """Answers each use of `trace` on the bench's model. The memories are pages of Python's documentation.

    The time of a use is measured from text to the first token on the host. No two uses have the same question. In the
    round of a hit, the same text is measured with nothing cached, by the independent forward pass, and its query alone,
    in random order. A miss is its own direct measurement. Ticks run between uses, so they do not slow down a use. The
    tier's budget is `budget_share` of the KV of all memories. answer_tokens: the length of the answers that are graded.
    """
    backend = bench.backend
    assert isinstance(backend, HFBackend)
    planning = Costs.measured(backend)
    texts = _Texts(backend, bench.memory.config.separator, trace)
    lengths = tuple(
        len(backend.template.memory_tokens(texts.now(i).memory).token_ids) for i in range(len(trace.tokens))
    )
    budget = int(budget_share * sum(map(planning.nbytes, lengths)))
    tier = "gpu" if backend.device.type == "cuda" else "ram"
    scheduler = MemScheduler(bench.memory, policy, {tier: budget}, costs=planning)
    for number in range(len(lengths)):
        scheduler.update(texts.now(number))
    moves: list[ReplayedMove] = []
    try:
        with Witness.of(embedding_of(backend)) as witness:
            player = Player(bench, scheduler, policy, witness, answer_tokens)

            def written(memory_id: str, kind: str) -> ReplayedMove:
                tokens, seconds = lengths[int(memory_id)], _build_s(scheduler, memory_id)
                return ReplayedMove(
                    tokens=tokens,
                    moved_bytes=planning.nbytes(tokens),
                    build_s=seconds if kind == "build" else None,
                    kept_s=seconds if kind == "admit" else None,
                )

            for event in trace.events:
                if event.kind == "edit":
                    scheduler.update(texts.edited(event.memory))
                    continue
                text, query = texts.now(event.memory), texts.question(event.memory, len(player.uses))
                admissions = scheduler.admissions
                player.use(text, query, lengths[event.memory])
                if scheduler.admissions > admissions:
                    moves.append(written(text.id, "admit"))
                if len(player.uses) % tick_every == 0:
                    moves += [written(move.memory_id, move.kind) for move in scheduler.tick() if move.target]
    finally:
        scheduler.close()
    played = replace(trace, tokens=lengths, query_tokens=round(float(np.mean(player.query_tokens))))
    return Replayed(
        player.uses,
        moves,
        played,
        planning,
        player.measured(),
        list(player.items.values()),
        player.builds_s,
        TierEvidence(view_off_stored=player.view_off),
    )


@dataclass
class Player:
    """Answers one use after the other, and keeps what was measured of each."""

    bench: Bench
    scheduler: MemScheduler
    policy: str
    witness: Witness | None
    answer_tokens: int
    uses: list[ReplayedUse] = field(default_factory=list)
    query_tokens: list[int] = field(default_factory=list)
    items: dict[str, KVCacheItem] = field(default_factory=dict)
    builds_s: list[float] = field(default_factory=list)
    context_tokens: list[int] = field(default_factory=list)
    view_off: float = 0.0
    view: CacheView | FileView | None = None
    """What the scheduler lent to the last answer."""

    def __post_init__(self) -> None:
        backend = self.bench.backend
        self.arms = {
            self.policy: Arm(self._answer),
            DIRECT: Arm(self._direct, backend.reset),
            **judging_arms(self.bench, self._split),
        }
        self.miss = Arm(self._answer)
        self.samples: dict[str, list[Sample]] = {name: [] for name in self.arms}
        self.traces: dict[str, AnswerTrace] = {}
        self._rng = random.Random(self.bench.setup.seed)
        self._origin = time.perf_counter()

    def use(self, text: TextualMemoryItem, query: str, memory_tokens: int) -> None:
        """One use of a memory of `memory_tokens` tokens; of a hit, also the arms that it is compared with."""
        self.text = text
        direct_s = None
        if self._is_hit():
            for name in self._rng.sample(sorted(self.arms), len(self.arms)):
                self.samples[name].append(ttft.timed_call(self.arms[name], query, self._origin, self.witness))
            sample, direct_s = self.samples[self.policy][-1], self.samples[DIRECT][-1].user_s
            self.context_tokens.append(memory_tokens)
            self._look_at_kv(query)
        else:
            sample = ttft.timed_call(self.miss, query, self._origin, self.witness)
        prompt_tokens, cached = len(sample.prompt.ids), sample.token.cached_tokens
        self.query_tokens.append(prompt_tokens - memory_tokens)
        self.uses.append(
            ReplayedUse(
                memory_tokens=memory_tokens,
                new_tokens=prompt_tokens - cached,
                cached_tokens=cached,
                user_s=sample.user_s,
                outer_s=sample.outer_s,
                computed_tokens=sample.computed_tokens,
                direct_s=direct_s,
            )
        )
        self.scheduler.observe([text], query, None if direct_s is not None else self.view)

    def measured(self) -> Measured:
        return Measured(
            self.samples,
            self.traces,
            conditions=self.bench.conditions_now(),
            calls_made={name: arm.calls for name, arm in self.arms.items()},
            context_tokens=self.context_tokens,
        )

    def _is_hit(self) -> bool:
        with self.scheduler.view([self.text]) as cache:
            return len(cache.tokens.token_ids) > 0

    def _look_at_kv(self, query: Query) -> None:
        """Compares the view with what is stored, keeps the item, and grades the first hit's answer."""
        item_id, _ = self.scheduler.index.stored()[self.text.id]
        with self.scheduler.items.use(item_id) as item, self.scheduler.view([self.text]) as cache:
            self.items.setdefault(item_id, item)
            self.builds_s.append(item.metadata.build_s)
            if isinstance(cache, CacheView):
                self.view_off = max(self.view_off, view_off(item, cache) or 0.0)
            if not self.traces:
                backend, steps = self.bench.backend, self.answer_tokens
                prompt = backend.split(query, cache)
                self.traces[self.policy] = ttft.trace(backend, prompt, lambda: cache, steps)
                self.traces[DIRECT] = ttft.trace(backend, TokenizedPrompt((), prompt.ids), None, steps)

    def _answer(self, query: Query) -> Sample:
        """One first token with what the scheduler has of the memory."""
        backend = self.bench.backend
        started = time.perf_counter()
        with self.scheduler.view([self.text]) as cache:
            ttft.synchronize(backend.device)
            fetched = time.perf_counter()
            prompt = backend.split(query, cache)
            ready = time.perf_counter()
            token = backend.first_token(prompt, cache)
            done = time.perf_counter()
            held = backend.held_tokens(prompt, cache)
        self.view = cache
        return Sample(done - ready, done - started, fetched - started, token, prompt, held, split_s=ready - fetched)

    def _direct(self, query: Query) -> Sample:
        return ttft.direct(self.bench.backend, self.scheduler.index.tokens(self.text), query)

    def _split(self, query: Query) -> TokenizedPrompt:
        return self.bench.backend.template.split(self.scheduler.index.tokens(self.text), query)


class _Texts:
    """The current texts of the memories. Each begins with a different page, and an edit replaces the whole text."""

    def __init__(self, backend: HFBackend, separator: str, trace: Trace) -> None:
        self._backend, self._separator, self._trace = backend, separator, trace
        topics = sorted(QUESTIONS)
        self._topics = [topics[number % len(topics)] for number in range(len(trace.tokens))]
        self._edits = [0] * len(trace.tokens)
        self._texts = [self._cut(number) for number in range(len(trace.tokens))]

    def now(self, number: int) -> TextualMemoryItem:
        return self._texts[number]

    def edited(self, number: int) -> TextualMemoryItem:
        """Replaces the text with its next revision, which has the same number of tokens."""
        self._edits[number] += 1
        self._texts[number] = self._cut(number)
        return self._texts[number]

    def question(self, number: int, use: int) -> str:
        """The question of a use. A number before it makes each one different, so that no answer can be remembered."""
        numbered = f"{100_000 + use}: {QUESTIONS[self._topics[number]][use % 2]}"
        return as_query(self._backend.template, numbered)

    def _cut(self, number: int) -> TextualMemoryItem:
        head = f"Page {number}, revision {self._edits[number]}. "
        whole = head + docs_text(self._topics[number], f"{self._trace.seed} {number}")
        tokens = self._trace.tokens[number]
        (text,) = cut_memories([whole], tokens, self._backend.template, self._separator, "reuse_trace")
        return TextualMemoryItem(id=str(number), memory=text)


def _build_s(scheduler: MemScheduler, memory_id: str) -> float:
    """The build time, in seconds, of the memory's item in the tiers."""
    of_item = {
        metadata.textual_memory.id: metadata.build_s
        for metadata in map(scheduler.items.metadata, scheduler.items.ids())
        if metadata.textual_memory is not None
    }
    return of_item[memory_id]
