"""A trace played for real: every use answered through the scheduler, which learns, builds and evicts as it goes."""

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
"""(new tokens, tokens behind which they were computed, seconds)."""


@dataclass(frozen=True)
class Replayed:
    """What was measured. `trace`: as it was played, with the lengths that the tokenizer gave."""

    outcome: Outcome
    trace: Trace
    samples: Samples
    planning: Costs
    """What the scheduler believed that things cost, measured before the replay."""
    same_first_tokens: int
    """Of the hits: how many gave the same first token as the whole prompt with nothing cached."""


def replay(memory: KVCacheMemory, trace: Trace, policy: str, budget_share: float, tick_every: int) -> Replayed:
    """Answers each use of `trace` on `memory`'s model, its memories being pages of Python's documentation.

    A use's seconds run from text to the first token on the host. A hit's direct time is taken right behind it, from the
    same text with nothing cached; a miss is its own. Ticks run between uses, not beside them, so that they cost no use
    anything. The budget is a share of the KV of all memories.
    """
    backend = memory.backend
    assert isinstance(backend, HFBackend)
    planning = Costs.measured(backend)
    texts = _Texts(backend, memory.config.separator, trace)
    lengths = tuple(
        len(backend.template.memory_tokens(texts.now(i).memory).token_ids) for i in range(len(trace.tokens))
    )
    budget = int(budget_share * sum(lengths) * planning.kv_bytes_a_token)
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
                moved_bytes += lengths[int(move.memory_id)] * planning.kv_bytes_a_token
            if move.kind == "build":
                took_s = _build_s(scheduler, move.memory_id)
                samples.append((lengths[int(move.memory_id)], 0, took_s))
                build_s += took_s
    outcome = Outcome(np.array(ttft_s), saved_s, build_s, hits, hit_tokens, used_tokens, scheduler.builds, moved_bytes)
    scheduler.close()
    played = replace(trace, tokens=lengths, query_tokens=round(float(np.mean(query_tokens))))
    return Replayed(outcome, played, samples, planning, same)


class _Texts:
    """The memories' texts as they are now: each begins with a page of its own, and an edit makes it another text."""

    def __init__(self, backend: HFBackend, separator: str, trace: Trace) -> None:
        self._backend, self._separator, self._trace = backend, separator, trace
        topics = sorted(QUESTIONS)
        self._topics = [topics[number % len(topics)] for number in range(len(trace.tokens))]
        self._edits = [0] * len(trace.tokens)
        self._texts = [self._cut(number) for number in range(len(trace.tokens))]

    def now(self, number: int) -> TextualMemoryItem:
        return self._texts[number]

    def edited(self, number: int) -> TextualMemoryItem:
        """The next revision of the text, of the same length in tokens."""
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
    """Seconds of the build whose KV is in the tiers now."""
    of_item = {
        metadata.textual_memory.id: metadata.build_s
        for metadata in map(scheduler.items.metadata, scheduler.items.ids())
        if metadata.textual_memory is not None
    }
    return of_item[memory_id]
