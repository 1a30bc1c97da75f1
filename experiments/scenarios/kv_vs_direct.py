"""What does injecting a memory save over sending it as prompt text, and is the output the same?"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from functools import partial
from statistics import median
from typing import ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from experiments import baselines
from experiments.baselines import SharedTensors
from experiments.bench import Bench, Measured, build_once, builds_s, compare, judging_arms, products_of
from experiments.measurement import Witness, embedding_of, statistics, ttft
from experiments.results import Row, TTFTPayload, between, user_speedup
from experiments.scenarios.base import ModelScenario
from experiments.workloads import Cell, other_questions
from kvmem.cache import KVCacheItem


@plain_dataclass(frozen=True, kw_only=True)
class KVvsDirectPayload(TTFTPayload):
    """The comparison of both arms, and the TTFT of the shared-tensors recipe if it was measured."""

    name: ClassVar[str] = "kv_vs_direct"

    shared_tensors_ttft_s: float | None = None
    shared_tensors_ttft_all_s: list[float] = field(default_factory=list)
    injected_over_shared_tensors: float | None = None
    """Median of the paired ratios of the two TTFTs."""
    injected_over_shared_tensors_interval: tuple[float, float] | None = None


@dataclass(config=ConfigDict(extra="forbid"))
class KVvsDirect(ModelScenario[Cell]):
    """Measures TTFT with the memory injected and with the memory as prompt text, and compares the greedy answers.

    Both arms receive the same token ids, in interleaved pairs.
    """

    pairs: int = Field(default=6, ge=1)
    """Interleaved pairs for each cell; 30 for a published figure. Fewer than 6 give no interval and no verdict."""
    answer_tokens: int = Field(default=16, ge=1)
    """The number of greedy tokens that are compared."""
    beside_recipe: bool = False
    """Also measure a plain shared-tensors recipe in the same rounds, in cells with one memory."""

    name: ClassVar[str] = "kv_vs_direct"
    question: ClassVar[str] = (
        "What does injecting a memory save over sending it as prompt text, and is the output the same?"
    )
    lockstep: ClassVar[bool] = True

    def cells(self, bench: Bench) -> Sequence[Cell]:
        setup = bench.setup
        return setup.workload.cells(bench.backend.template, setup.separator)

    def measure(self, bench: Bench, cell: Cell) -> list[Row]:
        items = [build_once(bench, source) for source in cell.memories]
        stored = {item.kv_cache_id: item for item in items}  # equal texts are one item, which may be injected twice
        bench.memory.add(stored.values())
        try:
            return [self._compare(bench, cell, items)]
        finally:
            bench.memory.delete(stored)

    def _compare(self, bench: Bench, cell: Cell, items: list[KVCacheItem]) -> Row:
        memory, backend = bench.memory, bench.backend
        ids = [item.kv_cache_id for item in items]
        tokens = memory.get_cache(ids).tokens
        split = partial(backend.template.split, tokens)
        queries = other_questions(backend.template, tokens, cell.question, self.pairs, bench.setup.seed)
        arms = {
            "injected": ttft.Arm(partial(ttft.injected, memory, backend, ids), backend.reset),
            "direct": ttft.Arm(partial(ttft.direct, backend, tokens), backend.reset),
            **judging_arms(bench, split),
        }
        if self.beside_recipe and len(items) == 1:
            arms["shared_tensors"] = baselines.arm(SharedTensors.name, backend, items[0], tokens)
        rounds = [queries[i % len(queries)] for i in range(self.pairs)]
        with Witness.of(embedding_of(backend)) as witness:
            samples, runs = ttft.interleaved_calm(arms, rounds, random.Random(bench.setup.seed), witness=witness)
        conditions = bench.conditions_now()
        prompts = {name: samples[name][0].prompt for name in ("injected", "direct")}
        measured = Measured(
            samples,
            {
                "injected": ttft.trace(backend, prompts["injected"], lambda: memory.get_cache(ids), self.answer_tokens),
                "direct": ttft.trace(backend, prompts["direct"], None, self.answer_tokens),
            },
            runs,
            len(queries) == 1 < self.pairs,
            conditions,
            {name: arm.calls for name, arm in arms.items()},
            {name: products_of(bench, samples[name][0], arms[name].run, rounds[0]) for name in prompts},
        )
        payload: Callable[..., KVvsDirectPayload] = KVvsDirectPayload
        if "shared_tensors" in samples:
            seconds = measured.engine_s("shared_tensors")
            over, interval = statistics.paired_ratio(measured.engine_s("injected"), seconds)
            payload = partial(
                KVvsDirectPayload,
                shared_tensors_ttft_s=median(seconds),
                shared_tensors_ttft_all_s=seconds,
                injected_over_shared_tensors=over,
                injected_over_shared_tensors_interval=interval,
            )
        return compare(
            bench,
            self.name,
            cell,
            "injected",
            measured,
            items=items,
            builds_s=builds_s(bench, items),
            payload=payload,
        )

    @classmethod
    def answer(cls, rows: Sequence[Row]) -> str:
        times = [100 / (100 - saved_pct) for row in rows if (saved_pct := user_speedup(row)) is not None]
        if not times:
            return ""
        merging = ", with merging" if any(row.memories > 1 for row in rows) else ""
        return (
            f"With an injected memory the first token comes {between(times)} times as fast as with the memory as "
            f"prompt text, from text to the first token{merging}."
        )
