"""The figures of a row, computed again from its timed calls.

It shares no code with the statistics that the figures were made by, so that a fault of either shows as a difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median

from experiments.results import ALONE, DerivedPayload, Evidence, JudgedPayload, Row, TTFTPayload

BATCHES = 6
CLOSE = 1e-6


def wrong_figures(
    row: Row, figures: TTFTPayload, evidence: Evidence
) -> Iterator[tuple[str, float | None, float | None]]:
    """Each figure that its calls don't give: its name, the stored number, and what the calls give."""
    kv, direct = (_seconds(evidence, arm) for arm in (row.arm, evidence.direct_arm))
    kv_user, direct_user = (_seconds(evidence, arm, "user_s") for arm in (row.arm, evidence.direct_arm))
    ratios = [a / b for a, b in zip(kv, direct, strict=True)]
    cache_s, build_s = median(_seconds(evidence, row.arm, "cache_s")), median(evidence.build_all_s)
    saved_s = median(direct_user) - median(kv_user)
    interval = _interval(ratios)
    low, high = (None, None) if interval is None else (100 * (1 - interval[1]), 100 * (1 - interval[0]))
    stored_low, stored_high = figures.speedup_interval or (None, None)
    pairs: list[tuple[str, float | None, float | None]] = [
        ("the speed-up", figures.speedup_pct, 100 * (1 - median(ratios))),
        ("the low end of its interval", stored_low, low),
        ("the high end of its interval", stored_high, high),
        ("the injected TTFT", figures.kv_ttft_s, median(kv)),
        ("the direct TTFT", figures.direct_ttft_s, median(direct)),
        ("the injected user TTFT", figures.kv_user_ttft_s, median(kv_user)),
        ("the direct user TTFT", figures.direct_user_ttft_s, median(direct_user)),
        ("the build time", figures.build_s, build_s),
        ("the merge time", figures.merge_s, cache_s if row.memories > 1 else None),
        ("the fetch time", figures.fetch_s, cache_s if row.memories == 1 else None),
        ("break even", figures.break_even_queries, build_s / saved_s if saved_s > 0 else None),
        ("the number of pairs", row.pairs, len(kv)),
    ]
    if alone := _seconds(evidence, ALONE):
        pairs.append(("the TTFT of the query alone", figures.query_alone_s, median(alone)))
    if isinstance(row.payload, JudgedPayload):
        again_of = row.payload.from_calls(row, evidence)
        pairs += [(name, getattr(row.payload, name), again) for name, again in again_of.items()]
    for name, stored, again in pairs:
        if not _close(stored, again):
            yield name, stored, again
    if isinstance(row.payload, DerivedPayload):
        yield from wrong_derived_figures(row, row.payload)


def wrong_derived_figures(row: Row, payload: DerivedPayload) -> Iterator[tuple[str, float | None, float | None]]:
    """Each figure that what the row stores does not give: its name, the stored number, and the number it gives."""
    for name, again in payload.recomputed(row).items():
        stored = getattr(payload, name)
        if not _close(stored, again):
            yield name, stored, again


def _close(stored: float | None, again: float | None) -> bool:
    if stored is None or again is None:
        return stored is again
    return math.isclose(stored, again, rel_tol=CLOSE, abs_tol=CLOSE)


def _seconds(evidence: Evidence, arm: str, clock: str = "engine_s") -> list[float]:
    """One of an arm's clocks by round."""
    calls = sorted((call for call in evidence.calls if call.arm == arm), key=lambda call: call.round)
    return [float(getattr(call, clock)) for call in calls]


def _interval(ratios: Sequence[float]) -> tuple[float, float] | None:
    """The range of the medians of 6 batches of neighbours, of which the first are one longer."""
    if len(ratios) < BATCHES:
        return None
    size, longer = divmod(len(ratios), BATCHES)
    starts = [i * size + min(i, longer) for i in range(BATCHES + 1)]
    medians = [median(ratios[a:b]) for a, b in pairwise(starts)]
    return min(medians), max(medians)
