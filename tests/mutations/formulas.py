"""Figures that don't follow from the samples."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np

from experiments.bench import comparison
from experiments.measurement import statistics, ttft
from experiments.scenarios import kv_vs_direct
from tests.mutations.mutation import SMOLLM2, Mutation, Patch

KIND = "formulas"


def _swapped(original: Any) -> Any:
    return lambda kv_s, direct_s: original(direct_s, kv_s)


def _unpaired(original: Any) -> Any:
    return lambda kv_s, direct_s: original(sorted(kv_s), sorted(direct_s, reverse=True))


def _half(original: Any) -> Any:
    def interval(kv_s: Any, direct_s: Any) -> tuple[float, float]:
        low, high = np.percentile(np.asarray(kv_s) / np.asarray(direct_s), [25, 75])
        return 100 * (1 - float(high)), 100 * (1 - float(low))

    return interval


def _least_over_median(original: Any) -> Any:
    return lambda kv_s, direct_s: 100 * (1 - min(kv_s) / median(direct_s))


def _of_medians(original: Any) -> Any:
    return lambda kv_s, direct_s: 100 * (1 - min(kv_s) / max(direct_s))


def _in_blocks(original: Any) -> Any:
    """Each arm runs all its rounds before the next one does."""

    def interleaved(arms: Any, *given: Any, **named: Any) -> Any:
        found: Any = {}
        for name, arm in arms.items():
            found |= original({name: arm}, *given, **named)
        return found

    return interleaved


def _same_order(original: Any) -> Any:
    class Sorted:
        def sample(self, names: list[str], count: int) -> list[str]:
            return names

    return lambda arms, queries, rng, *given, **named: original(arms, queries, Sorted(), *given, **named)


def _chosen(kept: int, told: int) -> Any:
    """All rounds are run twice, and run `kept` of the two counts, as if its result had been the better one."""

    def make(original: Any) -> Any:
        def interleaved_calm(*given: Any, **named: Any) -> Any:
            return [ttft.interleaved(*given, **named) for _ in range(2)][kept], told

        return interleaved_calm

    return make


def _uncounted_merge(original: Any) -> Any:
    """The clock starts when the memories are merged."""

    def injected(*given: Any) -> Any:
        sample = original(*given)
        return replace(sample, user_s=sample.user_s - sample.cache_s, cache_s=0.0)

    return injected


def _payload(**changed: Any) -> Any:
    """Replaces fields of the payload by functions of their values."""

    def make(original: Any) -> Any:
        def compare(*given: Any, payload: Any = comparison.TTFTPayload, **named: Any) -> Any:
            def wrong(**fields: Any) -> Any:
                return payload(**fields | {name: change(fields) for name, change in changed.items()})

            return original(*given, payload=wrong, **named)

        return compare

    return make


def _told(**changed: Any) -> Patch:
    return Patch(kv_vs_direct, "compare", _payload(**changed))


def _figure(name: str, expected: str, **changed: Any) -> Mutation:
    return Mutation(KIND, name, expected, (_told(**changed),))


def _statistic(name: str, of: str, make: Any) -> Mutation:
    return Mutation(KIND, name, "is stored as", (Patch(statistics, of, make),), SMOLLM2)


def _best(name: str, kept: int, told: int) -> Mutation:
    return Mutation(KIND, name, "was called", (Patch(ttft, "interleaved_calm", _chosen(kept, told)),))


MERGED = (*SMOLLM2, "merge=cacheblend", "workload.memories=2")
MUTATIONS = [
    _statistic("the speed-up has its arms swapped", "speedup_pct", _swapped),
    _statistic("the speed-up divides the least by the median", "speedup_pct", _least_over_median),
    _statistic("the speed-up divides the least by the largest", "speedup_pct", _of_medians),
    _statistic("the interval is not paired", "speedup_interval", _unpaired),
    _statistic("the interval holds half", "speedup_interval", _half),
    Mutation(KIND, "the arms are not interleaved", "overlap|interleaved", (Patch(ttft, "interleaved", _in_blocks),)),
    Mutation(KIND, "every round has the same order", "same order", (Patch(ttft, "interleaved", _same_order),)),
    _figure(
        "break even counts half the build",
        "break even",
        break_even_queries=lambda f: (f["break_even_queries"] or 2) / 2,
    ),
    _figure("the injected TTFT is the least", "injected TTFT", kv_ttft_s=lambda f: min(f["kv_ttft_all_s"])),
    _figure("the direct TTFT is the largest", "direct TTFT", direct_ttft_s=lambda f: max(f["direct_ttft_all_s"])),
    _figure("the user TTFT leaves out half", "user TTFT", kv_user_ttft_s=lambda f: f["kv_user_ttft_s"] / 2),
    _best("the first of two runs is kept as the better one", 0, 1),
    _best("the second of two runs is kept as the better one", 1, 1),
    _best("the first of two runs is kept, and two are told", 0, 2),
    Mutation(KIND, "the merge is not timed", "not in its TTFT", (Patch(ttft, "injected", _uncounted_merge),), MERGED),
    Mutation(KIND, "the merge time is not told", "merge time", (_told(merge_s=lambda f: 0.0),), MERGED),
    _figure("the build time is halved", "build time", build_s=lambda f: f["build_s"] / 2),
]
