"""What does injecting a memory buy over sending it as prompt text, and is the output the same?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import median
from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from experiments import measure, recipes
from experiments.bench import Bench
from experiments.equality import Trace, grade
from experiments.measure import Sample
from experiments.row import Row
from experiments.scenarios import Scenario
from experiments.verdict import judge
from experiments.workloads import Cell
from kvmem.items import KVCacheItem, Source


@dataclass(config=ConfigDict(extra="forbid"))
class KVvsDirect(Scenario):
    """Both arms eat the same token ids, in interleaved pairs, and answer greedily."""

    pairs: int = Field(default=5, ge=1)
    """Interleaved pairs a cell; 30 for a figure to publish."""
    answer_tokens: int = Field(default=16, ge=1)
    """Greedy tokens of each arm that are compared."""
    beside_recipe: bool = False
    """Also time a plain shared-tensors recipe in the same rounds (one memory only)."""

    name: ClassVar[str] = "kv_vs_direct"

    def cells(self, bench: Bench) -> Sequence[Cell]:
        config = bench.config
        return config.workload.cells(bench.backend.template, config.separator)

    def measure(self, bench: Bench, cell: Cell) -> list[Row]:
        items = [self._item(bench, source) for source in cell.memories]
        bench.memory.add(items)
        try:
            return [self._compare(bench, cell, items)]
        finally:
            bench.memory.delete([item.kv_cache_id for item in items])

    def _item(self, bench: Bench, source: Source) -> KVCacheItem:
        """Built once a source, after one build that warms up; earlier turns are extended by those that follow them."""
        for item in bench.built:
            if item.metadata.tokens.source == source:
                return item
        base = next((item for item in reversed(bench.built) if _goes_on(item.metadata.tokens.source, source)), None)
        turns = source if base is None else source[len(base.metadata.tokens.source) :]
        bench.memory.extract(turns, base=base)  # warms up this shape
        bench.built.append(bench.memory.extract(turns, base=base))
        return bench.built[-1]

    def _compare(self, bench: Bench, cell: Cell, items: list[KVCacheItem]) -> Row:
        memory, backend = bench.memory, bench.backend
        ids = [item.kv_cache_id for item in items]
        tokens = memory.get_cache(ids).tokens
        arms: dict[str, measure.Arm] = {
            "injected": lambda: measure.injected(memory, backend, ids, cell.question),
            "direct": lambda: measure.direct(backend, tokens, cell.question),
        }
        if self.beside_recipe and len(items) == 1:
            prompt = backend.template.split(tokens, cell.question)
            arms["shared_tensors"] = lambda: recipes.shared_tensors(backend, items[0], prompt)
        samples, runs = measure.interleaved_calm(arms, self.pairs, random.Random(bench.config.seed))
        conditions = bench.conditions_now()

        kv, direct = samples["injected"][0].prompt, samples["direct"][0].prompt
        kv_trace = measure.trace(backend, kv, memory.get_cache(ids), self.answer_tokens)
        direct_trace = measure.trace(backend, direct, None, self.answer_tokens)
        equality = grade(
            direct_trace,
            kv_trace,
            lambda step: measure.rounding_noise(backend, direct.ids + direct_trace.token_ids[:step]),
        )

        seconds = {name: [sample.engine_s for sample in taken] for name, taken in samples.items()}
        kv_s, direct_s = median(seconds["injected"]), median(seconds["direct"])
        build_s = sum(_build_s(bench, item) for item in items)
        limit_s, direct_limit_s = bench.limits_s(kv, direct)
        if kv_s < limit_s or direct_s < direct_limit_s:
            bench.recalibrate()
            limit_s, direct_limit_s = bench.limits_s(kv, direct)
        merge = bench.config.merge
        verdict = judge(
            direct_digest=direct.digest,
            injected_digest=kv.digest,
            cached_tokens=len(kv.memory_ids),
            expected_tokens=cell.context_tokens,
            kv_ttft_s=kv_s,
            direct_ttft_s=direct_s,
            kv_limit_s=limit_s,
            direct_limit_s=direct_limit_s,
            build_s=build_s,
            equality=equality.grade,
            exact=len(items) == 1 or merge.exact,
        )
        cache_s = median(sample.cache_s for sample in samples["injected"])
        kv_user_s = median(sample.user_s for sample in samples["injected"])
        direct_user_s = median(sample.user_s for sample in samples["direct"])
        return bench.row(
            self.name,
            context_tokens=cell.context_tokens,
            query_tokens=cell.query_tokens,
            memories=len(items),
            merge=merge.name if len(items) > 1 else "single",
            pairs=self.pairs,
            build_s=build_s,
            kv_bytes=sum(item.metadata.kv_bytes for item in items),
            fetch_s=cache_s if len(items) == 1 else None,
            merge_s=cache_s if len(items) > 1 else None,
            kv_ttft_s=kv_s,
            direct_ttft_s=direct_s,
            kv_user_ttft_s=kv_user_s,
            direct_user_ttft_s=direct_user_s,
            speedup_pct=measure.speedup_pct(seconds["injected"], seconds["direct"]),
            speedup_interval=measure.speedup_interval(seconds["injected"], seconds["direct"]),
            break_even_queries=build_s / (direct_user_s - kv_user_s) if direct_user_s > kv_user_s else None,
            cached_tokens=len(kv.memory_ids),
            limit_s=limit_s,
            mfu=bench.roofline.mfu(len(kv.query_ids), len(kv.memory_ids), kv_s),
            equality=equality.grade,
            first_difference=equality.first_difference,
            logit_max_abs_diff=equality.logit_max_abs_diff,
            near_tie_margin=equality.near_tie_margin,
            verdict=verdict.verdict,
            verdict_reason=verdict.reason,
            conditions=conditions | bench.conditions,  # the rates may have been calibrated anew
            extra=self._extra(bench, cell, samples, seconds, direct_limit_s, runs, kv_trace, direct_trace),
        )

    def _extra(
        self,
        bench: Bench,
        cell: Cell,
        samples: dict[str, list[Sample]],
        seconds: dict[str, list[float]],
        direct_limit_s: float,
        runs: int,
        kv_trace: Trace,
        direct_trace: Trace,
    ) -> dict[str, Any]:
        decode = bench.backend.tokenizer.decode
        extra: dict[str, Any] = {
            "context": cell.context,
            "query": cell.query,
            "question": cell.question,
            "truth": cell.truth,
            "answers": {"injected": decode(list(kv_trace.token_ids)), "direct": decode(list(direct_trace.token_ids))},
            "direct_limit_s": direct_limit_s,
            "measured_times": runs,
            "spread": {name: measure.spread(taken) for name, taken in seconds.items()},
        }
        for name, label in (("injected", "kv"), ("direct", "direct")):
            extra[f"{label}_ttft_all_s"] = seconds[name]
            if self.pairs >= 10:
                extra[f"{label}_ttft_p90_s"] = float(np.percentile(seconds[name], 90))
        if "shared_tensors" in seconds:
            ratio, low, high = measure.paired_ratio(seconds["injected"], seconds["shared_tensors"])
            extra |= {
                "shared_tensors_ttft_s": median(seconds["shared_tensors"]),
                "shared_tensors_ttft_all_s": seconds["shared_tensors"],
                "injected_over_shared_tensors": ratio,
                "injected_over_shared_tensors_interval": (low, high),
            }
        return extra


def _goes_on(earlier: Source, source: Source) -> bool:
    """True where `source` is a dialogue that `earlier` begins."""
    if isinstance(earlier, str) or isinstance(source, str):
        return False
    return len(earlier) < len(source) and source[: len(earlier)] == earlier


def _build_s(bench: Bench, item: KVCacheItem) -> float:
    """Seconds that the item took in all: an extended one stands on those built before it."""
    source = item.metadata.tokens.source
    return item.metadata.build_s + sum(
        built.metadata.build_s for built in bench.built if _goes_on(built.metadata.tokens.source, source)
    )
