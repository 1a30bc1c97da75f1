"""What does injection buy a server under load: TTFT percentiles, throughput, and the rate that it sustains?"""

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
from kvmem.engines.vllm import Arrival, Served, VLLMBackend
from kvmem.errors import ConfigError, KVMemError
from kvmem.prompt import TokenizedPrompt

ARMS = ("direct", "native hit", "injected")


@plain_dataclass(frozen=True)
class ArmCell:
    """One arm at all rates; one after another, each from an empty engine."""

    label: str
    context_tokens: int
    query_tokens: int
    alone_s: float
    """The direct arm's TTFT on an idle engine."""
    whole_s: float
    """The same to its last token: the inverse is the rate that loads are multiples of."""


@plain_dataclass(frozen=True)
class PlannedRequest:
    """One request before an arm takes it: when it comes, which memory it asks, and its question as text."""

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
    """The rate, as a multiple of what the direct arm serves one request at a time."""
    requests_a_second: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    """Of fewer than 100 requests their maximum."""
    served_a_second: float
    local_pct: float | None
    """Share of the prompt tokens that the engine's own prefix cache held; None if no request was answered."""
    injected_pct: float | None
    """Share of the prompt tokens that came from a memory's file."""
    goal_ttft_s: float
    sustained_a_second: float
    """The highest measured rate of this arm whose p99 is within the goal; 0: none."""
    requests: int
    cached_tokens: int | None = None
    """Tokens of all prompts that were not computed."""
    ttft_all_s: list[float]


@dataclass(config=ConfigDict(extra="forbid"))
class UnderLoad(ModelScenario[ArmCell]):
    """Requests arrive at a seeded Poisson rate, and each asks one of `memories` memories, drawn by Zipf's law.

    direct      the memory is prompt text, and nothing is shared
    native hit  the memory is prompt text, and the engine's prefix cache finds the blocks that it still holds
    injected    as native hit, and what the engine does not hold is loaded from the memory's file

    Each run begins with an empty prefix cache. A rate is a multiple of what the direct arm serves one by one here.
    """

    memories: PositiveInt = 6
    memory_tokens: PositiveInt = 256
    zipf_exponent: float = Field(default=1.0, ge=0)
    """0: every memory is as popular as any other."""
    loads: list[PositiveFloat] = field(default_factory=lambda: [1.0, 2.0, 4.0])
    """Rates, as multiples of requests a second that the direct arm serves one after another."""
    requests: PositiveInt = 16
    """A run's requests: 16 are three minutes on two cores; a p99 of fewer than 100 is their maximum."""
    new_tokens: PositiveInt = 4
    """Tokens of each answer."""
    goal_ttft_s: PositiveFloat | None = None
    """What p99 TTFT must stay under; null: twice the direct arm's TTFT on an idle engine."""

    name: ClassVar[str] = "under_load"
    question: ClassVar[str] = (
        "What does injection buy a server under load: TTFT percentiles, throughput, and the rate that it sustains?"
    )

    def cells(self, bench: Bench) -> Sequence[ArmCell]:
        backend = bench.backend
        if not isinstance(backend, VLLMBackend):
            raise ConfigError(
                f"scenario=under_load needs an engine that serves requests together, and "
                f"backend={type(backend).name} does not. Use backend=vllm."
            )
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
        held = {item.kv_cache_id for item in bench.memory.get_all()}
        bench.memory.add([item for item in items if item.kv_cache_id not in held])
        return items

    def _requests(self, bench: Bench, rate: float) -> list[PlannedRequest]:
        """The same requests for every arm; each question has a number, so that no two share more than the memory."""
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
        """Seconds of one direct request on an idle engine: to its first token, and to its last. Medians of five."""
        engine = bench.backend
        assert isinstance(engine, VLLMBackend)
        taken = []
        for ask in self._requests(bench, 1.0)[:5]:
            prompt = ttft.direct_prompt(bench.backend, item.metadata.tokens, ask.question)
            engine.serving.serve([Arrival(0.0, prompt, None, self.new_tokens, uuid.uuid4().hex)])  # warms up
            taken += engine.serving.serve([Arrival(0.0, prompt, None, self.new_tokens, uuid.uuid4().hex)])
        first = float(np.median([one.first_token_s for one in taken]))
        return first, float(np.median([one.finished_s for one in taken]))

    def _run(self, bench: Bench, arm: str, items: list[KVCacheItem], rate: float) -> tuple[list[Served], float]:
        """What became of each request, and the seconds from the first arrival to the last token."""
        engine, memory = bench.backend, bench.memory
        assert isinstance(engine, VLLMBackend)
        bench.backend.reset()
        requests = self._requests(bench, rate)
        arrivals = []
        for ask in requests:
            item = items[ask.memory]
            prompt = self._prompt(bench, item, ask.question)
            cache_view = memory.get_cache([item.kv_cache_id]) if arm == "injected" else None
            whole = prompt if arm == "injected" else TokenizedPrompt((), prompt.ids)
            salt = uuid.uuid4().hex if arm == "direct" else None
            arrivals.append(Arrival(ask.at_s, whole, cache_view, self.new_tokens, salt))
        served = engine.serving.serve(arrivals)
        ends = [ask.at_s + one.finished_s for ask, one in zip(requests, served, strict=True)]
        return served, max(ends) - requests[0].at_s

    @classmethod
    def answer(cls, rows: Sequence[Row]) -> str:
        by_arm = [(row.arm, row.payload) for row in rows if isinstance(row.payload, UnderLoadPayload)]
        highest = max(payload.load for _, payload in by_arm)
        at_highest = [(arm, payload) for arm, payload in by_arm if payload.load == highest]
        p99 = ", ".join(f"{arm} {formatting.seconds(payload.ttft_p99_s)}" for arm, payload in at_highest)
        rate = formatting.digits(at_highest[0][1].requests_a_second)
        return f"At {rate} requests a second 99 of 100 have their first token within: {p99}."


def percentile(served: Sequence[Served], percent: float) -> float:
    """Of the TTFT, in seconds; with "higher", so that no request is slower than a p100 of few."""
    return float(np.percentile([one.first_token_s for one in served], percent, method="higher"))
