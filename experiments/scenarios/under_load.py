"""What does injection improve on a server under load: TTFT percentiles, throughput, and the sustained rate?"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from experiments.bench import (
    Bench,
    Load,
    Measured,
    ServedRequest,
    alone_sample,
    build_once,
    builds_s,
    compare,
    judged_again,
    judging_arms,
    serve,
)
from experiments.measurement import ttft, verdict, vllm_generate
from experiments.results import DIRECT, GENERATE, NATIVE, JudgedPayload, Row, formatting, ttft_of
from experiments.scenarios.base import ModelScenario
from experiments.workloads import Cell, as_query, cut_memories, docs_texts, other_questions
from kvmem.cache import KVCacheItem
from kvmem.engines import Backend
from kvmem.engines.vllm import Arrival, VLLMBackend
from kvmem.prompt import Query, TokenizedPrompt

INJECTED = "injected"
ARMS = (DIRECT, NATIVE, INJECTED)
OPEN_LOOP_S = 1e-3
"""What the open loop may cost beside vLLM's own `LLM.generate`: it asks for each token as it comes."""
CLOCK_SLACK_S = 0.02
"""By how much the two clocks of a load may differ in any case: an arrival waits for the engine's step to end."""


@plain_dataclass(frozen=True)
class ArmCell:
    """One arm at all rates. Each rate starts with an empty engine."""

    label: str
    context_tokens: int
    query_tokens: int
    alone_s: float
    """The direct arm's TTFT on an idle engine."""
    whole_s: float
    """The direct arm's seconds to its last token on an idle engine. Loads are multiples of 1 / whole_s."""
    alone_all_s: tuple[float, ...]
    whole_all_s: tuple[float, ...]


@plain_dataclass(frozen=True)
class PlannedRequest:
    """One request: its arrival time, the number of the memory that it uses, and its question as text."""

    at_s: float
    memory: int
    question: str


@plain_dataclass(frozen=True, kw_only=True)
class Plan:
    """What the arrival times and the memories of a load follow from."""

    seed: int
    memories: int
    zipf_exponent: float
    requests: int

    def draw(self, rate: float) -> tuple[list[float], list[int]]:
        """The arrival of each request in seconds, and the number of its memory."""
        rng = np.random.default_rng(self.seed)
        popularity = 1.0 / np.arange(1, self.memories + 1) ** self.zipf_exponent
        chosen = rng.choice(self.memories, size=self.requests, p=popularity / popularity.sum())
        at_s = np.cumsum(rng.exponential(1 / rate, size=self.requests))
        return [float(at) for at in at_s], [int(memory) for memory in chosen]


@plain_dataclass(frozen=True, kw_only=True)
class UnderLoadPayload(JudgedPayload):
    """One arm at one request rate. TTFT runs from a request's arrival to its first token.

    `judged` compares the arm with the direct one on an idle engine, in interleaved rounds.
    """

    name: ClassVar[str] = "under_load"
    columns: ClassVar[tuple[str, ...]] = (
        "load",
        "requests_a_second",
        "ttft_p50_s",
        "ttft_p90_s",
        "ttft_p99_s",
        "served_a_second",
        "local_pct",
        "injected_pct",
        "goal_ttft_s",
        "sustained_a_second",
        "requests",
    )

    load: float
    """The request rate, as a multiple of the rate that the direct arm serves one request at a time."""
    requests_a_second: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    """The maximum if there are fewer than 100 requests."""
    served_a_second: float
    local_pct: float | None
    """The share of prompt tokens found in the engine's prefix cache, in percent; None if no request was answered."""
    injected_pct: float | None
    """The share of prompt tokens loaded from a memory's file, in percent; None if no request was answered."""
    goal_ttft_s: float
    sustained_a_second: float
    """The highest measured rate of this arm whose p99 TTFT is within the goal; 0 if there is none."""
    requests: int
    cached_tokens: int | None = None
    """The number of prompt tokens, over all requests, that were not computed."""
    ttft_all_s: list[float]
    served: Load | None = None
    """Every request of this load; None in rows of older rules."""
    plan: Plan | None = None
    goal_given_s: float | None = None
    alone_all_s: list[float] = field(default_factory=list)
    """The direct arm's TTFTs on an idle engine, of which the goal is twice the median."""
    whole_all_s: list[float] = field(default_factory=list)
    """Its seconds to the last token, of which the rates are multiples."""
    p99_by_rate: list[tuple[float, float]] = field(default_factory=list)
    """Of this arm at all rates."""
    engine_tokens: int | None = None
    """How many tokens the engine's blocks hold."""

    def recomputed(self, row: Row) -> dict[str, float | None]:
        if self.served is None:
            return {}
        rate = self.load / float(np.median(self.whole_all_s))
        goal_s = self.goal_given_s or 2 * float(np.median(self.alone_all_s))
        return {
            **_figures(self.served),
            "requests_a_second": rate,
            "goal_ttft_s": goal_s,
            "sustained_a_second": max((of for of, p99_s in self.p99_by_rate if p99_s <= goal_s), default=0.0),
        }

    def failures(self, row: Row) -> list[str]:
        if self.served is None:
            return []
        requests = self.served.requests
        return [
            *_failed(requests),
            *_wrong_hits(row.arm, requests),
            *self._missing_hits(row.arm, requests),
            *self._wrong_answers(requests),
            *_too_fast(requests),
            *_wrong_clocks(self.served),
            *self._wrong_plan(requests),
        ]

    def _missing_hits(self, arm: str, requests: Sequence[ServedRequest]) -> list[str]:
        """Blocks that an earlier request left are used: an arm that reuses is not held back."""
        longest = sum(one.prompt_tokens for one in requests)
        if arm == DIRECT or self.engine_tokens is None or longest > self.engine_tokens:
            return []  # some blocks may be gone
        missed = 0
        for number, one in enumerate(requests):
            left = [of for of in requests[:number] if of.memory == one.memory and of.at_s + of.finished_s < one.at_s]
            missed += bool(left) and not one.error and one.cached_tokens < one.memory_tokens
        return [f"{missed} of {len(requests)} requests did not reuse what an earlier one left"] if missed else []

    def _wrong_answers(self, requests: Sequence[ServedRequest]) -> list[str]:
        evidence = self.judged.evidence if self.judged else None
        allowed = 2 * ((evidence.tolerance if evidence else None) or 0.0)
        wrong = sum(one.margin > allowed for one in requests)
        return [f"{wrong} of {len(requests)} answers are not those of vLLM's own cold prefill"] if wrong else []

    def _wrong_plan(self, requests: Sequence[ServedRequest]) -> list[str]:
        if self.plan is None:
            return []
        at_s, memories = self.plan.draw(self.requests_a_second)
        if [one.memory for one in requests] != memories or not np.allclose([one.at_s for one in requests], at_s):
            return ["its requests did not arrive as the seed says"]
        return []


@dataclass(config=ConfigDict(extra="forbid"))
class UnderLoad(ModelScenario[ArmCell]):
    """Requests arrive in a seeded Poisson process. Each uses one of `memories` memories, drawn by Zipf's law.

    direct      The memory is prompt text. Requests share no blocks.
    native hit  The memory is prompt text. The engine reuses the blocks that are still in its prefix cache.
    injected    Like native hit, but blocks that are not in the prefix cache are loaded from the memory's file.

    Each run starts with an empty prefix cache. Rates are multiples of the rate that the direct arm serves on this
    machine one request at a time.
    """

    memories: PositiveInt = 6
    memory_tokens: PositiveInt = 256
    zipf_exponent: float = Field(default=1.0, ge=0)
    """The exponent of Zipf's law. With 0, all memories are equally popular."""
    loads: list[PositiveFloat] = field(default_factory=lambda: [1.0, 2.0, 4.0])
    """Request rates, as multiples of the rate that the direct arm serves one request at a time."""
    requests: PositiveInt = 16
    """Requests in each run. 16 take three minutes on two cores. The p99 of fewer than 100 is their maximum."""
    pairs: PositiveInt = 6
    """Interleaved rounds on an idle engine, by which each arm is judged. Fewer than 6 give no verdict."""
    new_tokens: PositiveInt = 4
    """The number of tokens in each answer."""
    goal_ttft_s: PositiveFloat | None = None
    """The upper limit for p99 TTFT; null means twice the direct arm's TTFT on an idle engine."""

    engines: ClassVar[tuple[type[Backend], ...]] = (VLLMBackend,)
    measures_workload: ClassVar[bool] = False
    name: ClassVar[str] = "under_load"
    question: ClassVar[str] = (
        "What does injection improve on a server under load: TTFT percentiles, throughput, and the sustained rate?"
    )

    def cells(self, bench: Bench) -> Sequence[ArmCell]:
        items = self._items(bench)
        query_tokens = len(self._prompt(bench, items[0], self._requests(bench, 1.0)[0].question).query_ids)
        alone_s, whole_s = self._alone(bench, items[0])
        idle = float(np.median(alone_s)), float(np.median(whole_s)), tuple(alone_s), tuple(whole_s)
        return [ArmCell(arm, self.memory_tokens, query_tokens, *idle) for arm in ARMS]

    def measure(self, bench: Bench, cell: ArmCell) -> list[Row]:
        items = self._items(bench)
        idle = self._idle(bench, cell, items[0])
        rates = [load / cell.whole_s for load in self.loads]
        served = [self._run(bench, cell.label, items, rate) for rate in rates]
        p99_by_rate = [(rate, percentile(of.requests, 99)) for rate, of in zip(rates, served, strict=True)]
        return [
            self._row(bench, cell, idle, load, rate, of, p99_by_rate)
            for load, rate, of in zip(self.loads, rates, served, strict=True)
        ]

    def _row(
        self,
        bench: Bench,
        cell: ArmCell,
        idle: Row,
        load: float,
        rate: float,
        served: Load,
        p99_by_rate: list[tuple[float, float]],
    ) -> Row:
        """A row of one load: `idle`, the comparison on an idle engine, with the figures of the load."""
        goal_s = self.goal_ttft_s or 2 * cell.alone_s
        blocks = idle.conditions.get("blocks")
        payload = UnderLoadPayload(
            load=load,
            requests_a_second=rate,
            **_figures(served),
            goal_ttft_s=goal_s,
            sustained_a_second=max((of for of, p99_s in p99_by_rate if p99_s <= goal_s), default=0.0),
            ttft_all_s=[one.first_token_s for one in served.requests],
            served=served,
            plan=self._plan(bench),
            goal_given_s=self.goal_ttft_s,
            alone_all_s=list(cell.alone_all_s),
            whole_all_s=list(cell.whole_all_s),
            p99_by_rate=p99_by_rate,
            engine_tokens=blocks * (bench.backend.prefix_block_tokens or 0) if isinstance(blocks, int) else None,
            judged=ttft_of(idle),
        )
        return judged_again(replace(idle, payload=payload))

    def _idle(self, bench: Bench, cell: ArmCell, item: KVCacheItem) -> Row:
        """The arm beside the direct one on an idle engine, through the same open loop, judged like any other."""
        memory, backend, ids = bench.memory, bench.backend, [item.kv_cache_id]
        assert isinstance(backend, VLLMBackend)
        tokens = item.metadata.tokens
        question = self._requests(bench, 1.0)[0].question
        queries = other_questions(backend.template, tokens, question, self.pairs, bench.setup.seed)
        split = partial(backend.template.split, tokens)

        def injected(query: Query) -> ttft.Sample:
            started = time.perf_counter()
            view = memory.get_cache(ids)
            fetched = time.perf_counter()
            prompt = backend.split(query, view)
            done = time.perf_counter()
            held = backend.held_tokens(prompt, view)
            return alone_sample(bench, prompt, prompt, view, fetched - started, done - fetched, held)

        def whole(hits: bool, query: Query) -> ttft.Sample:
            started = time.perf_counter()
            prompt = split(query)
            ready = time.perf_counter()
            held = ttft.whole_blocks(backend, len(prompt.memory_ids)) if hits else 0
            return alone_sample(bench, TokenizedPrompt((), prompt.ids), prompt, None, 0.0, ready - started, held)

        def fill() -> None:
            ttft.fill_prefix_cache(backend, tokens.token_ids, lambda: memory.get_cache(ids))

        arms = {DIRECT: ttft.Arm(partial(whole, False), backend.reset), **judging_arms(bench, split)}
        if cell.label == INJECTED:
            arms[INJECTED] = ttft.Arm(injected, backend.reset)
        elif cell.label == NATIVE:
            generate = partial(vllm_generate.first_token, backend.llm)
            arms[NATIVE] = ttft.Arm(partial(whole, True), fill)
            arms[GENERATE] = ttft.Arm(partial(ttft.native_hit, backend, tokens, first_token=generate), fill)
        rounds = [queries[i % len(queries)] for i in range(self.pairs)]
        samples, runs = ttft.interleaved_calm(arms, rounds, random.Random(bench.setup.seed))
        prompt = split(queries[0])
        view = memory.get_cache(ids) if cell.label == INJECTED else None
        plain = TokenizedPrompt((), prompt.ids)
        traces = {DIRECT: ttft.trace(backend, plain, None, self.new_tokens)}
        if cell.label == INJECTED:
            behind = backend.split(queries[0], view)
            traces[INJECTED] = ttft.trace(backend, behind, lambda: memory.get_cache(ids), self.new_tokens)
        elif cell.label == NATIVE:
            traces[NATIVE] = ttft.native_trace(backend, prompt, self.new_tokens)
        calls = {name: arm.calls for name, arm in arms.items()}
        one_query = len(queries) == 1 < len(rounds)
        return compare(
            bench,
            self.name,
            Cell("", item.metadata.token_count, "", cell.query_tokens, (tokens.source,), question),
            cell.label,
            Measured(samples, traces, runs, one_query, bench.conditions_now(), calls),
            items=[item],
            builds_s=builds_s(bench, [item]),
            peer=GENERATE if cell.label == NATIVE else "",
            slack_s=OPEN_LOOP_S,
        )

    def _items(self, bench: Bench) -> list[KVCacheItem]:
        template, separator = bench.backend.template, bench.setup.separator
        texts = [docs_texts(bench.setup.seed, i, 1).memories for i in range(self.memories)]
        cut = [cut_memories(text, self.memory_tokens, template, separator, "under_load")[0] for text in texts]
        items = [build_once(bench, text) for text in cut]
        present = {item.kv_cache_id for item in bench.memory.get_all()}
        new = {item.kv_cache_id: item for item in items if item.kv_cache_id not in present}
        bench.memory.add(new.values())
        return items

    def _requests(self, bench: Bench, rate: float) -> list[PlannedRequest]:
        """The requests, the same for every arm. A number before each question limits shared prefixes to the memory."""
        at_s, chosen = self._plan(bench).draw(rate)
        questions = [docs_texts(bench.setup.seed, i, 1).question_for(()).variants[-1] for i in range(self.memories)]
        template = bench.backend.template
        return [
            PlannedRequest(at, memory, as_query(template, f"{random.Random(n).randrange(10**6)}: {questions[memory]}"))
            for n, (at, memory) in enumerate(zip(at_s, chosen, strict=True))
        ]

    def _prompt(self, bench: Bench, item: KVCacheItem, question: str) -> TokenizedPrompt:
        return bench.backend.template.split(item.metadata.tokens, question)

    def _plan(self, bench: Bench) -> Plan:
        return Plan(
            seed=bench.setup.seed,
            memories=self.memories,
            zipf_exponent=self.zipf_exponent,
            requests=self.requests,
        )

    def _alone(self, bench: Bench, item: KVCacheItem) -> tuple[list[float], list[float]]:
        """The seconds of five direct requests on an idle engine, to their first and to their last token."""
        engine = bench.backend
        assert isinstance(engine, VLLMBackend)
        served = []
        for request in self._requests(bench, 1.0)[:5]:
            prompt = ttft.direct_prompt(bench.backend, item.metadata.tokens, request.question)
            engine.serving.serve([Arrival(0.0, prompt, None, self.new_tokens, uuid.uuid4().hex)])  # warms up
            served += engine.serving.serve([Arrival(0.0, prompt, None, self.new_tokens, uuid.uuid4().hex)])
        return [one.first_token_s for one in served], [one.finished_s for one in served]

    def _run(self, bench: Bench, arm: str, items: list[KVCacheItem], rate: float) -> Load:
        """Serves the requests of one arm."""
        memory = bench.memory
        bench.backend.reset()
        requests = self._requests(bench, rate)
        arrivals, full_hits = [], []
        for request in requests:
            item = items[request.memory]
            prompt = self._prompt(bench, item, request.question)
            cache_view = memory.get_cache([item.kv_cache_id]) if arm == INJECTED else None
            whole = prompt if arm == INJECTED else TokenizedPrompt((), prompt.ids)
            salt = uuid.uuid4().hex if arm == DIRECT else None
            arrivals.append(Arrival(request.at_s, whole, cache_view, self.new_tokens, salt))
            by_blocks = ttft.whole_blocks(bench.backend, len(prompt.memory_ids))
            full_hits.append(bench.backend.held_tokens(prompt, cache_view) if arm == INJECTED else by_blocks)
        return serve(bench, arrivals, [request.memory for request in requests], full_hits)

    @classmethod
    def answer(cls, rows: Sequence[Row]) -> str:
        by_arm = [(row.arm, row.payload) for row in rows if isinstance(row.payload, UnderLoadPayload)]
        highest = max(payload.load for _, payload in by_arm)
        at_highest = [(arm, payload) for arm, payload in by_arm if payload.load == highest]
        p99 = ", ".join(f"{arm} {formatting.seconds(payload.ttft_p99_s)}" for arm, payload in at_highest)
        rate = formatting.digits(at_highest[0][1].requests_a_second)
        return f"At {rate} requests a second, p99 TTFT is: {p99}."


def _figures(load: Load) -> dict[str, Any]:
    """The figures of a load that follow from its requests."""
    requests = load.requests
    answered = [one for one in requests if not one.error]
    prompt = sum(one.prompt_tokens for one in answered)
    local, injected = sum(one.local_tokens for one in answered), sum(one.injected_tokens for one in answered)
    seconds = max(one.at_s + one.finished_s for one in requests) - requests[0].at_s
    return {
        **{f"ttft_p{percent}_s": percentile(requests, percent) for percent in (50, 90, 99)},
        "served_a_second": len(answered) / seconds,
        "local_pct": 100 * local / prompt if prompt else None,
        "injected_pct": 100 * injected / prompt if prompt else None,
        "requests": len(requests),
        "cached_tokens": local + injected,
    }


def _failed(requests: Sequence[ServedRequest]) -> list[str]:
    errors = [one.error for one in requests if one.error]
    return [f"{len(errors)} of {len(requests)} requests failed, the first: {errors[0]}"] if errors else []


def _wrong_hits(arm: str, requests: Sequence[ServedRequest]) -> list[str]:
    """Each arm reuses what it says, and nothing beyond the memory."""
    cached = sum(one.cached_tokens for one in requests)
    if arm == DIRECT:
        return [f"{cached} tokens of the direct arm came from a cache"] if cached else []
    found = []
    if any(one.cached_tokens > one.memory_tokens for one in requests):
        found.append("more tokens of a request came from a cache than its memory has")
    if arm == NATIVE and any(one.injected_tokens for one in requests):
        found.append("tokens of the native hit were injected")
    if arm == INJECTED:
        missed = sum(not one.error and one.cached_tokens < one.memory_tokens for one in requests)
        found += [f"{missed} of {len(requests)} requests did not have their whole memory from KV"] if missed else []
        found += [] if any(one.injected_tokens for one in requests) else ["no token was injected"]
    return found


def _too_fast(requests: Sequence[ServedRequest]) -> list[str]:
    fast = sum(not one.error and one.first_token_s < one.limit_s for one in requests)
    if 2 * fast <= len(requests):  # a single one may be an error of the calibration
        return []
    return [f"{fast} of {len(requests)} first tokens came sooner than the hardware can compute them"]


def _wrong_clocks(load: Load) -> list[str]:
    """The loop's clock agrees with a second one, and the engine works while requests are running."""
    found = []
    slack_s = max(CLOCK_SLACK_S, verdict.MAX_LOST_SHARE * load.outer_s)
    seen = [one for one in load.requests if one.seen_s is not None and one.added_s is not None]
    if len(seen) < len(load.requests):
        found.append(f"{len(load.requests) - len(seen)} requests never reached the engine")
    for one in seen:
        assert one.seen_s is not None
        apart_s = one.seen_s - (one.at_s + one.first_token_s)
        if abs(apart_s) > slack_s:
            found.append(f"a first token came {1e3 * apart_s:.4g} ms after the time that its TTFT says")
            break
    lost_s = load.outer_s - max(one.at_s + one.finished_s for one in load.requests)
    if abs(lost_s) > slack_s:
        found.append(f"{1e3 * lost_s:.4g} ms of the load are in no request")
    if load.idle_s > slack_s:
        found.append(f"the engine did nothing for {1e3 * load.idle_s:.4g} ms while requests were running")
    return found


def percentile(served: Sequence[ServedRequest], percent: float) -> float:
    """A percentile of TTFT, in seconds. It is the TTFT of a request, the next higher one where it lies between two."""
    return float(np.percentile([one.first_token_s for one in served], percent, method="higher"))
