"""What does injection improve on a server under load: TTFT percentiles, and the highest rate within a goal?"""

from __future__ import annotations

import gc
import math
import random
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from experiments.bench import (
    Bench,
    Load,
    Measured,
    ServedRequest,
    Setup,
    alone_sample,
    build_once,
    builds_s,
    compare,
    judged_again,
    judging_arms,
    serve,
)
from experiments.load_arms import ARMS, LoadArm, arm_of, every_arm
from experiments.measurement import engine_conditions, page_cache, ttft, verdict, vllm_generate
from experiments.results import DIRECT, GENERATE, JudgedPayload, Row, formatting, ttft_of
from experiments.scenarios.base import ModelScenario
from experiments.traces import NO_MEMORY, ArrivalPlan, read_arrivals
from experiments.workloads import (
    QUESTIONS,
    Cell,
    as_query,
    cut_memories,
    docs_texts,
    memory_question,
    memory_text,
    other_questions,
)
from kvmem.cache import KVCacheItem
from kvmem.engines import Backend, FirstToken
from kvmem.engines.vllm import Arrival, Limit, VLLMBackend
from kvmem.errors import ConfigError
from kvmem.prompt import Query, TokenizedPrompt

COLD, WARM = "injected_cold", "injected"
"""The arm whose loads are compared with those of the other one, in requests that use no memory."""
OPEN_LOOP_S = 1e-3
"""What the open loop may cost beside vLLM's own `LLM.generate`: it asks for each token as it comes."""
CLOCK_SLACK_S = 0.02
"""By how much the two clocks of a load may differ in any case: an arrival waits for the engine's step to end."""
QUESTION_TOKENS = 100
"""What a question and the template take at most, for the check of the engine's window."""
FAQ_TOKENS = 30_000
"""About as many tokens as the generated FAQ of a company has at least."""
CLOSE = 1.001
"""Rates that differ by less are the same."""
LEAST_GOALS = 2
"""A search tries no rate at which all requests arrive within so many times the goal."""
SLOWEST, FASTEST = 1 / 16, 256
"""Between which multiples of its first rate a search looks."""


@plain_dataclass(frozen=True)
class ArmCell:
    """One arm at all rates and in all runs. Each load starts with an empty prefix cache."""

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
class Probe:
    """One load of an arm: its run, its rate, and what p99 TTFT it had."""

    run: int
    rate: float
    p99_s: float


@plain_dataclass(frozen=True, kw_only=True)
class UnderLoadPayload(JudgedPayload):
    """One arm at one request rate. TTFT runs from a request's arrival to its first token.

    Percentiles are of the requests that use a memory; with several runs, each figure is the median of the runs.
    `judged` compares the arm with the direct one on an idle engine, in interleaved rounds.
    """

    name: ClassVar[str] = "under_load"
    columns: ClassVar[tuple[str, ...]] = (
        "requests_a_second",
        "ttft_p50_s",
        "ttft_p90_s",
        "ttft_p99_s",
        "p99_low_s",
        "p99_high_s",
        "plain_p99_s",
        "plain_p99_over",
        "served_a_second",
        "local_pct",
        "injected_pct",
        "files_read",
        "goal_ttft_s",
        "sustained_a_second",
        "sustained_low",
        "sustained_high",
        "requests",
        "run_count",
        "given_up",
    )

    load: float | None = None
    """The request rate, as a multiple of the rate that the direct arm serves one request at a time."""
    requests_a_second: float | None = None
    """None in the row of an arm that was not measured."""
    ttft_p50_s: float | None = None
    ttft_p90_s: float | None = None
    ttft_p99_s: float | None = None
    """The maximum if there are fewer than 100 requests."""
    p99_low_s: float | None = None
    """The lowest p99 of the runs; None for one run."""
    p99_high_s: float | None = None
    plain_p99_s: float | None = None
    """The p99 TTFT of the requests that use no memory; None if there are none."""
    plain_p99_over: float | None = None
    """For cold files: plain_p99_s over that of the same requests while all files are in host memory."""
    served_a_second: float | None = None
    local_pct: float | None = None
    """The share of prompt tokens found in the engine's own caches, in percent; None if no request was answered."""
    injected_pct: float | None = None
    """The share of prompt tokens loaded from a memory's file, in percent; None if no request was answered."""
    files_read: float | None = None
    """Memory files read into host memory during a load; None on an engine without kvmem."""
    goal_ttft_s: float | None = None
    sustained_a_second: float | None = None
    """The highest measured rate of this arm whose p99 TTFT is within the goal; 0 if there is none."""
    sustained_low: float | None = None
    """The lowest of the runs; None for one run."""
    sustained_high: float | None = None
    requests: int | None = None
    """Of one run."""
    run_count: int | None = None
    given_up: int | None = None
    """In how many runs the load ended early, because its p99 could not be within the goal any more."""
    runs: list[Load] = field(default_factory=list)
    """Every request of each run."""
    without_loads: list[Load] = field(default_factory=list)
    """For cold files with `plain_share`: the same requests of each run while all files are in host memory."""
    plans: list[ArrivalPlan] = field(default_factory=list)
    """Of each run."""
    checked_answers: int = 0
    """How many answers of each load were compared with a cold prefill; a seed chooses which."""
    goal_given_s: float | None = None
    search_step: float | None = None
    """By which factor the rates of a search differ; None: there was none."""
    search_bounds: tuple[float, float] | None = None
    """The lowest and the highest rate that a search would try; None in rows that were measured before it was stored."""
    alone_all_s: list[float] = field(default_factory=list)
    """The direct arm's TTFTs on an idle engine, of which the goal is twice the median."""
    whole_all_s: list[float] = field(default_factory=list)
    """Its seconds to the last token, of which the rates are multiples."""
    probes: list[Probe] = field(default_factory=list)
    """Of this arm in all runs and at all rates."""
    engine_tokens: int | None = None
    """How many tokens the engine's blocks hold."""
    block_tokens: int = 0

    @property
    def is_measured(self) -> bool:
        return self.requests_a_second is not None

    def recomputed(self, row: Row) -> dict[str, float | None]:
        if not self.runs or self.requests_a_second is None:
            return {}
        goal_s = self.goal_given_s or 2 * median(self.alone_all_s)
        return {
            **_figures(self.runs, self.without_loads),
            "load": self.requests_a_second * median(self.whole_all_s),
            "goal_ttft_s": goal_s,
            **_sustained(self.probes, goal_s),
        }

    def failures(self, row: Row) -> list[str]:
        found = []
        for number, load in enumerate([*self.runs, *self.without_loads]):
            plan = self.plans[number % len(self.runs)]
            requests = load.requests
            label = arm_of(WARM).arm if number >= len(self.runs) else row.arm
            found += [
                *failed(requests),
                *_wrong_hits(label, requests, self.block_tokens),
                *self._missing_hits(label, requests),
                *_wrong_reads(label, load),
                *self._wrong_answers(plan, requests),
                *too_fast(requests),
                *wrong_clocks(load),
                *self._wrong_plan(plan, load),
            ]
        return found + list(self._unfinished_search())

    def _missing_hits(self, arm: str, requests: Sequence[ServedRequest]) -> list[str]:
        """Blocks that an earlier request left are used: an arm that reuses is not held back."""
        longest = sum(one.prompt_tokens for one in requests)
        if not arm_of(arm).reuses or self.engine_tokens is None or longest > self.engine_tokens:
            return []  # some blocks may be gone
        missed = 0
        for number, one in enumerate(requests):
            left = [of for of in requests[:number] if of.memory == one.memory and of.at_s + of.finished_s < one.at_s]
            uses = one.memory != NO_MEMORY and one.is_answered
            missed += bool(left) and uses and one.cached_tokens < one.memory_tokens
        return [f"{missed} of {len(requests)} requests did not reuse what an earlier one left"] if missed else []

    def _wrong_answers(self, plan: ArrivalPlan, requests: Sequence[ServedRequest]) -> list[str]:
        evidence = self.judged.evidence if self.judged else None
        allowed = 2 * ((evidence.tolerance if evidence else None) or 0.0)
        compared = _checked(plan, self.checked_answers)
        unseen = sum(n in compared and one.is_answered and one.margin is None for n, one in enumerate(requests))
        wrong = sum(one.margin is not None and one.margin > allowed for one in requests)
        found = [f"{unseen} answers were not compared with vLLM's own cold prefill"] if unseen else []
        what = f"{wrong} of {len(requests)} answers are not those of vLLM's own cold prefill"
        return [*found, what] if wrong else found

    def _wrong_plan(self, plan: ArrivalPlan, load: Load) -> list[str]:
        assert self.requests_a_second is not None
        at_s, memories = plan.draw(self.requests_a_second)
        count = len(load.requests)
        if count < len(at_s) and not load.stopped:
            return ["requests of its plan are left out"]
        same = [one.memory for one in load.requests] == memories[:count]
        if not same or not np.allclose([one.at_s for one in load.requests], at_s[:count]):
            return ["its requests did not arrive as the seed says"]
        return []

    def _unfinished_search(self) -> list[str]:
        """Each run's search ended between two neighbouring rates, of which the lower one is within the goal."""
        if self.search_step is None or self.goal_ttft_s is None:
            return []
        found = []
        for run in sorted({probe.run for probe in self.probes}):
            of_run = [probe for probe in self.probes if probe.run == run]
            best = max((probe.rate for probe in of_run if probe.p99_s <= self.goal_ttft_s), default=0.0)
            above = min((one.rate for one in of_run if one.p99_s > self.goal_ttft_s), default=math.inf)
            if self.search_bounds is None and (best == 0.0 or above == math.inf):
                continue  # whether the search reached one of its bounds is not stored
            lowest, highest = self.search_bounds or (0.0, math.inf)
            if above > CLOSE * max(best * self.search_step, lowest) and best * CLOSE < highest:
                found.append(f"the search of run {run + 1} ended between {best:.4g} and {above:.4g} requests a second")
        return found

    def remarks(self) -> list[str]:
        if not self.search_step or self.search_bounds is None:
            return []
        highest = self.search_bounds[1]
        if (self.sustained_a_second or 0.0) * CLOSE < highest:
            return []
        return [f"the search ended at its highest rate, {highest:.4g} requests a second"]


@dataclass(config=ConfigDict(extra="forbid"))
class UnderLoad(ModelScenario[ArmCell]):
    """Requests arrive in a seeded Poisson process, or as in a trace file. Each uses one of `memories` memories, drawn
    by Zipf's law, or none. The arms are the files of `experiments/load_arms/`.

    Each load starts with an empty prefix cache. All arms get the same requests at the same times.
    """

    memories: PositiveInt = 6
    memory_tokens: PositiveInt = 256
    zipf_exponent: float = Field(default=1.0, ge=0)
    """The exponent of Zipf's law. With 0, all memories are equally popular."""
    plain_share: float = Field(default=0.0, ge=0, lt=1)
    """The share of requests that use no memory."""
    plain_tokens: PositiveInt = 64
    """About the length of their prompts, in tokens."""
    trace_file: str | None = None
    """Arrivals from a file (`experiments/traces/arrivals.py`), stretched to each rate; null means a Poisson process."""
    arms: list[str] | None = None
    """The names of the arms; null means all that this machine can measure."""
    search: bool = True
    """Whether each arm's highest rate within the goal is searched for."""
    search_step: float = Field(default=1.5, gt=1.01, le=4)
    """The rates of a search are whole powers of it, so it is the resolution of the result."""
    search_from: PositiveFloat | None = None
    """The first rate of a search, in requests a second; null means what the direct arm serves one request at a time."""
    rates: list[PositiveFloat] = field(default_factory=list)
    """More rates to measure, in requests a second."""
    loads: list[PositiveFloat] = field(default_factory=list)
    """The same as multiples of the rate that the direct arm serves one request at a time."""
    requests: PositiveInt = 16
    """Requests in each load. The p99 of fewer than 100 is their maximum; 600 or more for a published figure."""
    runs: PositiveInt = 1
    """Loads at each rate, and searches, with other seeds; 3 or more for a published figure."""
    pairs: PositiveInt = 6
    """Interleaved rounds on an idle engine, by which each arm is judged. Fewer than 6 give no verdict."""
    new_tokens: PositiveInt = 4
    """The number of tokens in each answer."""
    goal_ttft_s: PositiveFloat | None = None
    """The upper limit for p99 TTFT; null means twice the direct arm's TTFT on an idle engine."""
    checked_answers: PositiveInt = 64
    """How many answers of each load are compared with a cold prefill of the whole prompt, after the load."""
    cold_from_disk: bool = False
    """Whether cold files are dropped from the operating system's page cache too, so that they come from the disk."""

    engines: ClassVar[tuple[type[Backend], ...]] = (VLLMBackend,)
    measures_workload: ClassVar[bool] = False
    name: ClassVar[str] = "under_load"
    question: ClassVar[str] = (
        "What does injection improve on a server under load: TTFT percentiles, and the highest rate within a goal?"
    )

    def __post_init__(self) -> None:
        self._prompts: dict[tuple[int, int], TokenizedPrompt] = {}

    def check(self, setup: Setup) -> None:
        super().check(setup)
        for name in self.arms or ():
            ARMS.find(name)
        if not self.search and not self.rates and not self.loads:
            raise ConfigError(
                "There is no rate to measure. Set scenario.search=true, scenario.rates or scenario.loads."
            )
        if self.memories > len(QUESTIONS) and self.memory_tokens > FAQ_TOKENS:
            raise ConfigError(
                f"scenario.memory_tokens={self.memory_tokens}: of {self.memories} memories only {len(QUESTIONS)} have "
                f"so much text, the others about {FAQ_TOKENS:,} tokens. Lower one of both."
            )
        window = getattr(setup.backend, "max_model_len", None)
        longest = max(self.memory_tokens, self.plain_tokens * (self.plain_share > 0)) + QUESTION_TOKENS
        if window is not None and longest + self.new_tokens > window:
            raise ConfigError(
                f"backend.max_model_len={window} does not hold a prompt of about {longest} tokens and "
                f"{self.new_tokens} of the answer. Raise it, or lower scenario.memory_tokens."
            )
        own = [arm.name for arm in self._arms() if arm.own_engine and not arm.unavailable()]
        if own and torch.cuda.is_available() and getattr(setup.backend, "kv_cache_gib", None) is None:
            raise ConfigError(
                f"The arms {', '.join(own)} have engines of their own beside the shared one, so each needs a fixed "
                "room for KV. Set backend.kv_cache_gib, or leave them out of scenario.arms."
            )
        self._trace()

    def cells(self, bench: Bench) -> Sequence[ArmCell]:
        engine = bench.backend
        assert isinstance(engine, VLLMBackend)
        self._check_host_memory(engine)
        items = self.items(bench)
        prompt = self._prompt(bench, items[0], self.question_to_first(bench, 0, 0))
        alone_s, whole_s = self._alone(bench, items[0])
        idle = median(alone_s), median(whole_s), tuple(alone_s), tuple(whole_s)
        return [ArmCell(arm.arm, self.memory_tokens, len(prompt.query_ids), *idle) for arm in self._arms()]

    def measure(self, bench: Bench, cell: ArmCell) -> list[Row]:
        arm, shared = arm_of(cell.label), bench.backend
        assert isinstance(shared, VLLMBackend)
        if reason := arm.unavailable():
            return [self._left_out(bench, cell, reason)]
        items, goal_s = self.items(bench), self.goal_ttft_s or 2 * cell.alone_s
        engine = arm.engine(shared)
        idle = self.idle(bench, engine, arm, cell, items[0])
        loads: dict[float, list[Measurement]] = {}

        def p99_s(run: int, rate: float, give_up: bool) -> float:
            """Of a load that was measured already, or is now."""
            found = next((one for one in loads.get(rate, ()) if one.run == run), None)
            if found is None:
                found = self._measurement(bench, engine, arm, items, run, rate, goal_s if give_up else None)
                loads.setdefault(rate, []).append(found)
            return percentile(found.load.requests, 99)

        exponent, lowest, highest = self._exponents(cell)
        for run in range(self.runs):
            for rate in [*self.rates, *(load / cell.whole_s for load in self.loads)]:
                p99_s(run, rate, give_up=False)
            if self.search:
                passes = partial(self._passes, partial(p99_s, run, give_up=True), goal_s)
                jump = 1 if run else self._steps(2)
                found = search(passes, exponent, jump, lowest, highest)
                exponent = lowest if found is None else found
        if engine is not shared:
            del engine
            gc.collect()  # its memory is free for the next arm's engine
        probes = [
            Probe(one.run, rate, percentile(one.load.requests, 99)) for rate in sorted(loads) for one in loads[rate]
        ]
        return [self._row(bench, cell, idle, rate, loads[rate], probes) for rate in sorted(loads)]

    def _passes(self, p99_s: Callable[[float], float], goal_s: float, exponent: int) -> bool:
        return p99_s(self.search_step**exponent) <= goal_s

    def _exponents(self, cell: ArmCell) -> tuple[int, int, int]:
        """Of the first rate of a search, and of the lowest and the highest that it would try."""
        first = round(math.log(self.search_from or 1 / cell.whole_s, self.search_step))
        lasting = self.requests / (LEAST_GOALS * (self.goal_ttft_s or 2 * cell.alone_s))
        highest = min(math.floor(math.log(lasting, self.search_step)), first + self._steps(FASTEST))
        first = min(first, highest)
        return first, first + self._steps(SLOWEST), highest

    def _steps(self, factor: float) -> int:
        """How many steps of a search come closest to `factor`; at least one."""
        steps = round(math.log(factor, self.search_step))
        return steps or 1

    def _measurement(
        self,
        bench: Bench,
        engine: VLLMBackend,
        arm: LoadArm,
        items: list[KVCacheItem],
        run: int,
        rate: float,
        goal_s: float | None,
    ) -> Measurement:
        """One load. goal_s: it is given up when its p99 can't be within that any more; None: it is not."""
        load = self._serve(bench, engine, arm, items, run, rate, goal_s)
        without_loads = None
        if arm.name == COLD and self.plain_share:
            without_loads = self._serve(bench, engine, ARMS.find(WARM)(), items, run, rate, goal_s)
        return Measurement(run, load, without_loads)

    def _serve(
        self,
        bench: Bench,
        engine: VLLMBackend,
        arm: LoadArm,
        items: list[KVCacheItem],
        run: int,
        rate: float,
        goal_s: float | None,
    ) -> Load:
        """Serves the requests of one run at one rate."""
        plan = self._plan(bench, run)
        at_s, memories = plan.draw(rate)
        arrivals, full_hits = [], []
        for number, (at, memory) in enumerate(zip(at_s, memories, strict=True)):
            prompt = self._prompt_of(bench, items, run, number, memory)
            if memory == NO_MEMORY:
                arrivals.append(Arrival(at, prompt, None, self.new_tokens, uuid.uuid4().hex))
                full_hits.append(0)
            else:
                sent = arm.sent(prompt, bench.memory.get_cache([items[memory].kv_cache_id]))
                arrivals.append(sent.at(at, self.new_tokens))
                full_hits.append(arm.held_tokens(engine, prompt))
        arm.prepare(engine, items)
        paths = [engine.store.file_of(item).path for item in items]
        if self.cold_from_disk and arm.name == COLD:
            for path in paths:
                page_cache.drop(path)
        in_page_cache = _page_cache_pct(paths) if arm.name == COLD else None
        has_connector = engine is bench.backend or arm.needs_files
        before = engine.host_cache().reads if has_connector else 0
        counted = [number for number, memory in enumerate(memories) if memory != NO_MEMORY]
        limit = None if goal_s is None else Limit(goal_s, 0.01 * len(counted), frozenset(counted))
        checked = _checked(plan, self.checked_answers)
        load = serve(bench, engine, arrivals, memories, full_hits, limit, checked)
        reads = engine.host_cache().reads - before if has_connector else None
        return replace(load, files_read=reads, page_cache_pct=in_page_cache)

    def _row(
        self,
        bench: Bench,
        cell: ArmCell,
        idle: Row,
        rate: float,
        measured: Sequence[Measurement],
        probes: list[Probe],
    ) -> Row:
        """A row of one rate: `idle`, the comparison on an idle engine, with the figures of the loads."""
        goal_s = self.goal_ttft_s or 2 * cell.alone_s
        blocks, block_tokens = idle.conditions.get("blocks"), idle.conditions.get("block_tokens")
        _, lowest, highest = self._exponents(cell)
        runs, sustained = [one.load for one in measured], _sustained(probes, goal_s)
        without_loads = [one.without_loads for one in measured if one.without_loads is not None]
        payload = UnderLoadPayload(
            load=rate * cell.whole_s,
            requests_a_second=rate,
            **_figures(runs, without_loads),
            goal_ttft_s=goal_s,
            sustained_a_second=sustained["sustained_a_second"],
            sustained_low=sustained["sustained_low"],
            sustained_high=sustained["sustained_high"],
            runs=runs,
            without_loads=without_loads,
            plans=[self._plan(bench, one.run) for one in measured],
            checked_answers=self.checked_answers,
            goal_given_s=self.goal_ttft_s,
            search_step=self.search_step if self.search else None,
            search_bounds=(self.search_step**lowest, self.search_step**highest),
            alone_all_s=list(cell.alone_all_s),
            whole_all_s=list(cell.whole_all_s),
            probes=probes,
            engine_tokens=blocks * block_tokens if isinstance(blocks, int) and isinstance(block_tokens, int) else None,
            block_tokens=block_tokens if isinstance(block_tokens, int) else 0,
            judged=ttft_of(idle),
        )
        return judged_again(replace(idle, payload=payload))

    def _left_out(self, bench: Bench, cell: ArmCell, reason: str) -> Row:
        return bench.row(
            self.name,
            arm=cell.label,
            context_tokens=cell.context_tokens,
            query_tokens=cell.query_tokens,
            conditions=bench.conditions_now(),
            payload=UnderLoadPayload(),
            verdict_reason=reason,
        )

    def idle(self, bench: Bench, engine: VLLMBackend, arm: LoadArm, cell: ArmCell, item: KVCacheItem) -> Row:
        """The arm beside the direct one on an idle engine, through the same open loop, judged like any other."""
        memory, shared, ids = bench.memory, bench.backend, [item.kv_cache_id]
        assert isinstance(shared, VLLMBackend)
        tokens = item.metadata.tokens
        question = self.question_to_first(bench, 0, 0)
        queries = other_questions(shared.template, tokens, question, self.pairs, bench.setup.seed)
        split = partial(shared.template.split, tokens)

        def sample(of: LoadArm, on: VLLMBackend, query: Query) -> ttft.Sample:
            started = time.perf_counter()
            view = memory.get_cache(ids)
            fetched = time.perf_counter()
            prompt = split(query)
            sent = of.sent(prompt, view).at(0.0, 1)
            done = time.perf_counter()
            return alone_sample(on, sent, prompt, fetched - started, done - fetched, of.held_alone(on, prompt))

        def generate(prompt: TokenizedPrompt) -> FirstToken:
            with engine.loop.turn():
                return vllm_generate.first_token(engine.llm, prompt)

        direct = arm_of(DIRECT)
        arms = {DIRECT: ttft.Arm(partial(sample, direct, shared), shared.reset), **judging_arms(bench, split)}
        prepare = partial(arm.prepare_alone, engine, item)
        if arm.arm != DIRECT:
            arms[arm.arm] = ttft.Arm(partial(sample, arm, engine), prepare)
        if arm.is_peer:
            arms[GENERATE] = ttft.Arm(partial(ttft.native_hit, engine, tokens, first_token=generate), prepare)
        rounds = [queries[i % len(queries)] for i in range(self.pairs)]
        samples, runs = ttft.interleaved_calm(arms, rounds, random.Random(bench.setup.seed))
        prompt, view = split(queries[0]), memory.get_cache(ids)
        traces = {DIRECT: direct.trace(shared, prompt, view, self.new_tokens)}
        traces[arm.arm] = arm.trace(engine, prompt, view, self.new_tokens)
        calls = {name: one.calls for name, one in arms.items()}
        one_query = len(queries) == 1 < len(rounds)
        conditions = bench.conditions_now() | engine_conditions(engine)
        return compare(
            bench,
            self.name,
            Cell("", item.metadata.token_count, "", cell.query_tokens, (tokens.source,), question),
            arm.arm,
            Measured(samples, traces, runs, one_query, conditions, calls),
            items=[item],
            builds_s=builds_s(bench, [item]),
            peer=GENERATE if arm.is_peer else "",
            slack_s=OPEN_LOOP_S,
        )

    def _arms(self) -> list[LoadArm]:
        """The chosen arms, in the order in which they are measured."""
        if self.arms is None:
            return every_arm()
        chosen = {ARMS.find(name) for name in self.arms}
        return [arm for arm in every_arm() if type(arm) in chosen]

    def _check_host_memory(self, engine: VLLMBackend) -> None:
        """Raises ConfigError if an arm needs all files in host memory, and they do not fit."""
        needed = self.memories * engine.fingerprint.kv_bytes(self.memory_tokens)
        budget = engine.host_cache().budget_bytes
        names = [arm.name for arm in self._arms() if arm.needs_files and not arm.unavailable()]
        if names and needed > budget:
            enough = math.ceil(1.05 * needed / 2**30)
            raise ConfigError(
                f"{self.memories} memories of {self.memory_tokens} tokens take {needed / 2**30:.3g} GiB, and host "
                f"memory for files has {budget / 2**30:.3g}. Set backend.host_cache_gib={enough}, "
                f"or leave {', '.join(names)} out of scenario.arms."
            )

    def items(self, bench: Bench) -> list[KVCacheItem]:
        """The memories. The first one's build is measured; the others are built once."""
        template, separator = bench.backend.template, bench.setup.separator
        known = {item.metadata.tokens.source: item for item in bench.built}
        items = []
        for number in range(self.memories):
            text = memory_text(bench.setup.seed, number)
            (cut,) = cut_memories([text], self.memory_tokens, template, separator, "under_load")
            if cut not in known and number:
                item = bench.memory.extract(cut)
                bench.built.append(item)
                bench.build_times_s[item.kv_cache_id] = [item.metadata.build_s]
            items.append(build_once(bench, cut))
        present = {item.kv_cache_id for item in bench.memory.get_all()}
        bench.memory.add({item.kv_cache_id: item for item in items if item.kv_cache_id not in present}.values())
        return items

    def question_to_first(self, bench: Bench, run: int, number: int) -> str:
        """The question of a request to memory 0. A number before each limits shared prefixes to the memory."""
        return self._question_about(bench, run, number, 0)

    def _question_about(self, bench: Bench, run: int, number: int, memory: int) -> str:
        salt = random.Random(f"{bench.setup.seed + run} {number}").randrange(10**6)
        return as_query(bench.backend.template, f"{salt}: {memory_question(bench.setup.seed, memory)}")

    def _prompt_of(
        self, bench: Bench, items: Sequence[KVCacheItem], run: int, number: int, memory: int
    ) -> TokenizedPrompt:
        """The prompt of a request, the same for every arm and rate."""
        key = run, number
        if key not in self._prompts:
            if memory == NO_MEMORY:
                prompt = bench.backend.template.bare(self._plain_query(bench, run, number))
            else:
                prompt = self._prompt(bench, items[memory], self._question_about(bench, run, number, memory))
            self._prompts[key] = prompt
        return self._prompts[key]

    def _plain_query(self, bench: Bench, run: int, number: int) -> str:
        """A question behind a passage, of about `plain_tokens` tokens."""
        template = bench.backend.template
        words = docs_texts(bench.setup.seed, number, 1).passage.split()[: self.plain_tokens]
        passage = " ".join(words)
        ids = template.tokenizer(passage, add_special_tokens=False).input_ids[: self.plain_tokens]
        salt = random.Random(f"{bench.setup.seed + run} {number}").randrange(10**6)
        return as_query(template, f"{salt}: {template.tokenizer.decode(ids)}")

    def _prompt(self, bench: Bench, item: KVCacheItem, question: str) -> TokenizedPrompt:
        return bench.backend.template.split(item.metadata.tokens, question)

    def _plan(self, bench: Bench, run: int) -> ArrivalPlan:
        gaps, used = self._trace()
        return ArrivalPlan(
            seed=bench.setup.seed + run,
            memories=self.memories,
            zipf_exponent=self.zipf_exponent,
            requests=self.requests,
            plain_share=self.plain_share,
            gaps=gaps,
            used=used,
        )

    def _trace(self) -> tuple[list[float] | None, list[int] | None]:
        if self.trace_file is None:
            return None, None
        return read_arrivals(Path(self.trace_file), self.requests, self.memories)

    def _alone(self, bench: Bench, item: KVCacheItem) -> tuple[list[float], list[float]]:
        """The seconds of five direct requests on an idle engine, to their first and to their last token."""
        engine = bench.backend
        assert isinstance(engine, VLLMBackend)
        served = []
        for number in range(5):
            prompt = ttft.direct_prompt(engine, item.metadata.tokens, self.question_to_first(bench, 0, number))
            engine.serving.serve([Arrival(0.0, prompt, None, self.new_tokens, uuid.uuid4().hex)])  # warms up
            served += engine.serving.serve([Arrival(0.0, prompt, None, self.new_tokens, uuid.uuid4().hex)])
        return [one.first_token_s for one in served], [one.finished_s for one in served]

    @classmethod
    def answer(cls, rows: Sequence[Row]) -> str:
        by_arm = [(row.arm, row.payload) for row in rows if isinstance(row.payload, UnderLoadPayload)]
        measured = [(arm, payload) for arm, payload in by_arm if payload.is_measured]
        if not measured:
            return ""
        searched = {arm: payload for arm, payload in measured if payload.search_step is not None}
        if searched:
            goal_s = next(iter(searched.values())).goal_ttft_s
            rates = ", ".join(
                f"{arm} {formatting.digits(one.sustained_a_second or 0.0)}" for arm, one in searched.items()
            )
            return f"The most requests a second with a p99 TTFT within {formatting.seconds(goal_s)}: {rates}."
        highest = max(payload.requests_a_second or 0.0 for _, payload in measured)
        at_highest = [(arm, payload) for arm, payload in measured if payload.requests_a_second == highest]
        p99 = ", ".join(f"{arm} {formatting.seconds(payload.ttft_p99_s)}" for arm, payload in at_highest)
        return f"At {formatting.digits(highest)} requests a second, p99 TTFT is: {p99}."


@plain_dataclass(frozen=True)
class Measurement:
    """One load, and the same requests with all files in host memory, if they are compared."""

    run: int
    load: Load
    without_loads: Load | None


def search(passes: Callable[[int], bool], start: int, jump: int, lowest: int, highest: int) -> int | None:
    """The highest exponent whose rate is within the goal, by bracketing and bisection; None if `lowest` is not.

    From `start` it goes up while rates pass, or down while they fail, by `jump`, then twice that, and so on. Between
    the last that passed and the first that failed it halves the distance, until they are neighbours.

    >>> tried = []
    >>> search(lambda k: tried.append(k) or k <= 9, start=0, jump=2, lowest=-8, highest=40), tried
    (9, [0, 2, 6, 14, 10, 8, 9])
    """
    if passes(start):
        low, high = start, highest + 1
        while low < highest:
            at = min(low + jump, highest)
            if not passes(at):
                high = at
                break
            low, jump = at, 2 * jump
    else:
        low, high = lowest - 1, start
        while high > lowest:
            at = max(high - jump, lowest)
            if passes(at):
                low = at
                break
            high, jump = at, 2 * jump
        if low < lowest:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low


def _checked(plan: ArrivalPlan, count: int) -> frozenset[int]:
    """The requests whose answers are compared with a cold prefill: the seed chooses them."""
    rng = np.random.default_rng([plan.seed, 2])
    return frozenset(int(one) for one in rng.choice(plan.requests, size=min(count, plan.requests), replace=False))


def _page_cache_pct(paths: Sequence[Path]) -> float | None:
    """The share of the files in the page cache; None on a file system that does not tell, such as one in memory."""
    try:
        return float(np.mean([page_cache.resident_pct(path) for path in paths]))
    except OSError:
        return None


def _with_memory(requests: Sequence[ServedRequest]) -> list[ServedRequest]:
    return [one for one in requests if one.memory != NO_MEMORY]


def _figures(runs: Sequence[Load], without_loads: Sequence[Load]) -> dict[str, Any]:
    """The figures of the loads at one rate that follow from their requests."""
    p99_s = [percentile(load.requests, 99) for load in runs]
    plain_s = [_plain_p99_s(load) for load in runs]
    beside_s = [_plain_p99_s(load) for load in without_loads]
    over = [cold / warm for cold, warm in zip(plain_s, beside_s, strict=False) if cold is not None and warm is not None]
    reads = [load.files_read for load in runs if load.files_read is not None]
    return {
        **{f"ttft_p{percent}_s": median(percentile(load.requests, percent) for load in runs) for percent in (50, 90)},
        "ttft_p99_s": median(p99_s),
        "p99_low_s": min(p99_s) if len(runs) > 1 else None,
        "p99_high_s": max(p99_s) if len(runs) > 1 else None,
        "plain_p99_s": _median([one for one in plain_s if one is not None]),
        "plain_p99_over": _median(over),
        "served_a_second": median(_served_a_second(load) for load in runs),
        "local_pct": _share_pct(runs, lambda one: one.local_tokens),
        "injected_pct": _share_pct(runs, lambda one: one.injected_tokens),
        "files_read": _median(reads),
        "requests": max(len(load.requests) for load in runs),
        "run_count": len(runs),
        "given_up": sum(load.stopped for load in runs),
    }


def _median(values: Sequence[float]) -> float | None:
    return float(median(values)) if values else None


def _plain_p99_s(load: Load) -> float | None:
    plain = [one.first_token_s for one in load.requests if one.memory == NO_MEMORY]
    return float(np.percentile(plain, 99, method="higher")) if plain else None


def _served_a_second(load: Load) -> float:
    requests = load.requests
    seconds = max(one.at_s + one.finished_s for one in requests) - requests[0].at_s
    return sum(one.is_answered for one in requests) / seconds


def _share_pct(runs: Sequence[Load], tokens: Callable[[ServedRequest], int]) -> float | None:
    """Of the prompt tokens of all answered requests that use a memory, in percent."""
    answered = [one for load in runs for one in _with_memory(load.requests) if one.is_answered]
    prompt = sum(one.prompt_tokens for one in answered)
    return 100 * sum(map(tokens, answered)) / prompt if prompt else None


def _sustained(probes: Sequence[Probe], goal_s: float) -> dict[str, float | None]:
    """The highest rate within the goal: of each run, and then the median, the lowest and the highest of the runs."""
    runs = sorted({probe.run for probe in probes})
    best = [max((one.rate for one in probes if one.run == run and one.p99_s <= goal_s), default=0.0) for run in runs]
    several = len(best) > 1
    return {
        "sustained_a_second": float(median(best)),
        "sustained_low": min(best) if several else None,
        "sustained_high": max(best) if several else None,
    }


def failed(requests: Sequence[ServedRequest]) -> list[str]:
    errors = [one.error for one in requests if one.error]
    return [f"{len(errors)} of {len(requests)} requests failed, the first: {errors[0]}"] if errors else []


def _wrong_hits(label: str, requests: Sequence[ServedRequest], block_tokens: int) -> list[str]:
    """Each arm reuses what it says, and nothing beyond the memory; requests without a memory reuse nothing."""
    plain = sum(one.cached_tokens for one in requests if one.memory == NO_MEMORY)
    found = [f"{plain} tokens of requests without a memory came from a cache"] if plain else []
    answered = [one for one in _with_memory(requests) if one.is_answered]
    return found + (arm_of(label).wrong_hits(answered, block_tokens) if answered else [])


def _wrong_reads(label: str, load: Load) -> list[str]:
    """Cold files are read during the load, each once, and warm ones are not."""
    arm = arm_of(label)
    if load.files_read is None or load.stopped:
        return []
    if arm.name == COLD:
        used = len({one.memory for one in _with_memory(load.requests)})
        if load.files_read != used:
            return [f"{load.files_read} files were read during the load, and {used} cold ones were used"]
    elif load.files_read:
        return [f"{load.files_read} files were read during a load whose arm reads none"]
    return []


def too_fast(requests: Sequence[ServedRequest]) -> list[str]:
    fast = sum(one.is_answered and one.first_token_s < one.limit_s for one in requests)
    if 2 * fast <= len(requests):  # a single one may be an error of the calibration
        return []
    return [f"{fast} of {len(requests)} first tokens came sooner than the hardware can compute them"]


def wrong_clocks(load: Load) -> list[str]:
    """The loop's clock agrees with a second one, and the engine works while requests are running."""
    found = []
    slack_s = max(CLOCK_SLACK_S, verdict.MAX_LOST_SHARE * load.outer_s)
    added = [one for one in load.requests if one.added_s is not None and (one.seen_s is not None or one.unfinished)]
    if len(added) < len(load.requests):
        found.append(f"{len(load.requests) - len(added)} requests never reached the engine")
    for one in added:
        if one.seen_s is None:
            continue
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
    """A percentile of the TTFT of requests that use a memory, in seconds. It is the TTFT of a request, the next higher
    one where it lies between two."""
    return float(np.percentile([one.first_token_s for one in _with_memory(served)], percent, method="higher"))
