"""What does injection improve on a server under load: TTFT percentiles, throughput, and the sustained rate?"""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from typing import ClassVar

import numpy as np
from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from experiments.bench import Bench, build_once
from experiments.measurement import ttft
from experiments.results import Payload, Row, formatting
from experiments.scenarios.base import ModelScenario
from experiments.workloads import as_query, cut_memories, docs_texts
from kvmem.cache import KVCacheItem
from kvmem.engines import Backend
from kvmem.engines.vllm import Arrival, Served, VLLMBackend
from kvmem.errors import KVMemError
from kvmem.prompt import TokenizedPrompt

ARMS = ("direct", "native hit", "injected")


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


@plain_dataclass(frozen=True)
class PlannedRequest:
    """One request: its arrival time, the number of the memory that it uses, and its question as text."""

    at_s: float
    memory: int
    question: str


@plain_dataclass(frozen=True, kw_only=True)
class UnderLoadPayload(Payload):
    """One arm at one request rate. TTFT runs from a request's arrival to its first token."""

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
        return [ArmCell(arm, self.memory_tokens, query_tokens, alone_s, whole_s) for arm in ARMS]

    def measure(self, bench: Bench, cell: ArmCell) -> list[Row]:
        items = self._items(bench)
        goal_s = self.goal_ttft_s or 2 * cell.alone_s
        runs = []
        for load in self.loads:
            served, seconds = self._run(bench, cell.label, items, load / cell.whole_s)
            runs.append((load, load / cell.whole_s, served, seconds))
        sustained = [rate for _, rate, served, _ in runs if percentile(served, 99) <= goal_s]
        highest = max(sustained, default=0.0)
        return [self._row(bench, cell, *run, goal_s, highest) for run in runs]

    def _row(
        self,
        bench: Bench,
        cell: ArmCell,
        load: float,
        rate: float,
        served: list[Served],
        seconds: float,
        goal_s: float,
        highest: float,
    ) -> Row:
        answers = [one.answer for one in served if not isinstance(one.answer, KVMemError)]
        errors = [str(one.answer) for one in served if isinstance(one.answer, KVMemError)]
        prompt = sum(answer.prompt_tokens for answer in answers)
        local = sum(answer.local_tokens for answer in answers)
        injected = sum(answer.injected_tokens for answer in answers)
        wrong = [f"{len(errors)} of {len(served)} requests failed, the first: {errors[0]}"] if errors else []
        if cell.label == "direct" and local + injected:
            wrong.append(f"{local + injected} tokens of the direct arm came from a cache")
        if cell.label == "injected" and not injected:
            wrong.append("no token was injected")
        payload = UnderLoadPayload(
            load=load,
            requests_a_second=rate,
            ttft_p50_s=percentile(served, 50),
            ttft_p90_s=percentile(served, 90),
            ttft_p99_s=percentile(served, 99),
            served_a_second=len(answers) / seconds,
            local_pct=100 * local / prompt if prompt else None,
            injected_pct=100 * injected / prompt if prompt else None,
            goal_ttft_s=goal_s,
            sustained_a_second=highest,
            requests=len(served),
            cached_tokens=local + injected,
            ttft_all_s=[one.first_token_s for one in served],
        )
        return bench.row(
            self.name,
            arm=cell.label,
            context_tokens=cell.context_tokens,
            query_tokens=cell.query_tokens,
            verdict="invalid" if wrong else "ok",
            verdict_reason="; ".join(wrong),
            conditions=bench.conditions_now(),
            payload=payload,
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
        rng = np.random.default_rng(bench.setup.seed)
        popularity = 1.0 / np.arange(1, self.memories + 1) ** self.zipf_exponent
        chosen = rng.choice(self.memories, size=self.requests, p=popularity / popularity.sum())
        at_s = np.cumsum(rng.exponential(1 / rate, size=self.requests))
        questions = [docs_texts(bench.setup.seed, i, 1).question_for(()).variants[-1] for i in range(self.memories)]
        template = bench.backend.template
        return [
            PlannedRequest(
                float(at), int(memory), as_query(template, f"{random.Random(n).randrange(10**6)}: {questions[memory]}")
            )
            for n, (at, memory) in enumerate(zip(at_s, chosen, strict=True))
        ]

    def _prompt(self, bench: Bench, item: KVCacheItem, question: str) -> TokenizedPrompt:
        return bench.backend.template.split(item.metadata.tokens, question)

    def _alone(self, bench: Bench, item: KVCacheItem) -> tuple[float, float]:
        """The seconds of a direct request on an idle engine, to its first and to its last token. Medians of five."""
        engine = bench.backend
        assert isinstance(engine, VLLMBackend)
        served = []
        for request in self._requests(bench, 1.0)[:5]:
            prompt = ttft.direct_prompt(bench.backend, item.metadata.tokens, request.question)
            engine.serving.serve([Arrival(0.0, prompt, None, self.new_tokens, uuid.uuid4().hex)])  # warms up
            served += engine.serving.serve([Arrival(0.0, prompt, None, self.new_tokens, uuid.uuid4().hex)])
        first = float(np.median([one.first_token_s for one in served]))
        return first, float(np.median([one.finished_s for one in served]))

    def _run(self, bench: Bench, arm: str, items: list[KVCacheItem], rate: float) -> tuple[list[Served], float]:
        """Serves the requests of one arm. Returns each outcome, and the seconds from the first arrival to the end."""
        engine, memory = bench.backend, bench.memory
        assert isinstance(engine, VLLMBackend)
        bench.backend.reset()
        requests = self._requests(bench, rate)
        arrivals = []
        for request in requests:
            item = items[request.memory]
            prompt = self._prompt(bench, item, request.question)
            cache_view = memory.get_cache([item.kv_cache_id]) if arm == "injected" else None
            whole = prompt if arm == "injected" else TokenizedPrompt((), prompt.ids)
            salt = uuid.uuid4().hex if arm == "direct" else None
            arrivals.append(Arrival(request.at_s, whole, cache_view, self.new_tokens, salt))
        served = engine.serving.serve(arrivals)
        ends = [request.at_s + one.finished_s for request, one in zip(requests, served, strict=True)]
        return served, max(ends) - requests[0].at_s

    @classmethod
    def answer(cls, rows: Sequence[Row]) -> str:
        by_arm = [(row.arm, row.payload) for row in rows if isinstance(row.payload, UnderLoadPayload)]
        highest = max(payload.load for _, payload in by_arm)
        at_highest = [(arm, payload) for arm, payload in by_arm if payload.load == highest]
        p99 = ", ".join(f"{arm} {formatting.seconds(payload.ttft_p99_s)}" for arm, payload in at_highest)
        rate = formatting.digits(at_highest[0][1].requests_a_second)
        return f"At {rate} requests a second, p99 TTFT is: {p99}."


def percentile(served: Sequence[Served], percent: float) -> float:
    """A percentile of TTFT, in seconds. It is the TTFT of a request, the next higher one where it lies between two."""
    return float(np.percentile([one.first_token_s for one in served], percent, method="higher"))
