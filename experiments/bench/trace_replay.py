"""Replays a trace on a model. The scheduler answers every use, and observes, builds and evicts meanwhile."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from experiments.traces import Outcome, Trace
from experiments.workloads import QUESTIONS, as_query, cut_memories, docs_text
from kvmem import KVCacheMemory, TextualMemoryItem
from kvmem.cache import dynamic_cache
from kvmem.engines.huggingface import HFBackend
from kvmem.scheduler import Costs, MemScheduler

Samples = list[tuple[int, int, float]]
"""(computed tokens, cached tokens before them, seconds) of each prefill."""


@dataclass(frozen=True)
class Replayed:
    """The measurements of a replay."""

    outcome: Outcome
    trace: Trace
    """The trace with the token counts of the actual texts."""
    samples: Samples
    planning: Costs
    """The scheduler's cost model, measured before the replay."""
    same_first_tokens: int
    """The number of hits with the same first token as the whole prompt with nothing cached."""


def replay(memory: KVCacheMemory, trace: Trace, policy: str, budget_share: float, tick_every: int) -> Replayed:
    """Answers each use of `trace` on `memory`'s model. The memories are pages of Python's documentation.

    The time of a use is measured from text to the first token on the host. After a hit, the same text is measured with
    nothing cached. A miss is its own direct measurement. Ticks run between uses, so they do not slow down a use. The
    tier's budget is `budget_share` of the KV of all memories.
    """
    backend = memory.backend
    assert isinstance(backend, HFBackend)
    planning = Costs.measured(backend)
    texts = _Texts(backend, memory.config.separator, trace)
    lengths = tuple(
        len(backend.template.memory_tokens(texts.now(i).memory).token_ids) for i in range(len(trace.tokens))
    )
    budget = int(budget_share * sum(map(planning.nbytes, lengths)))
    tier = "gpu" if backend.device.type == "cuda" else "ram"
    scheduler = MemScheduler(memory, policy, {tier: budget}, costs=planning)
    for number in range(len(lengths)):
        scheduler.update(texts.now(number))
    samples: Samples = []
    ttft_s: list[float] = []
    query_tokens: list[int] = []
    saved_s = build_s = 0.0
    hits = hit_tokens = used_tokens = moved_bytes = same = 0
    for event in trace.events:
        if event.kind == "edit":
            scheduler.update(texts.edited(event.memory))
            continue
        text, query = texts.now(event.memory), texts.question(event.memory, len(ttft_s))
        used_tokens += lengths[event.memory]
        started = time.perf_counter()
        answer = scheduler.answer(query, [text], max_new_tokens=1)
        ttft_s.append(time.perf_counter() - started)
        samples.append((answer.prompt_tokens - answer.cached_tokens, answer.cached_tokens, ttft_s[-1]))
        query_tokens.append(answer.prompt_tokens - lengths[event.memory])
        if answer.cached_tokens:
            nothing = dynamic_cache.empty_view(scheduler.index.tokens(text), backend.model_config)
            started = time.perf_counter()
            direct = backend.generate(query, nothing, max_new_tokens=1)
            direct_s = time.perf_counter() - started
            samples.append((direct.prompt_tokens, 0, direct_s))
            saved_s += direct_s - ttft_s[-1]
            hits, hit_tokens = hits + 1, hit_tokens + lengths[event.memory]
            same += direct.token_ids == answer.token_ids
        if len(ttft_s) % tick_every:
            continue
        for move in scheduler.tick():
            if move.target is not None:
                moved_bytes += planning.nbytes(lengths[int(move.memory_id)])
            if move.kind == "build":
                took_s = _build_s(scheduler, move.memory_id)
                samples.append((lengths[int(move.memory_id)], 0, took_s))
                build_s += took_s
    outcome = Outcome(np.array(ttft_s), saved_s, build_s, hits, hit_tokens, used_tokens, scheduler.builds, moved_bytes)
    scheduler.close()
    played = replace(trace, tokens=lengths, query_tokens=round(float(np.mean(query_tokens))))
    return Replayed(outcome, played, samples, planning, same)


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
        return as_query(self._backend.template, QUESTIONS[self._topics[number]][use % 2])

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
