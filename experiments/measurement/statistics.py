"""Medians of paired samples and intervals that hold under drift, outliers and correlated noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NOISY_SPREAD = 0.25
"""A run in which an arm's interquartile range exceeds this share of its median was disturbed, and is repeated."""
BATCHES = 6
"""An interval is the range of so many batch medians, and fewer pairs than this have none."""
COVERAGE = 1 - 2 * 0.5**BATCHES
"""Of such an interval, 96.9%: all of `BATCHES` independent medians lie on one side of the true one with 2 × 0.5^6."""
Interval = tuple[float, float]


def spread(seconds: Sequence[float]) -> float:
    low, median, high = np.percentile(seconds, [25, 50, 75])
    return float((high - low) / median)


def speedup_pct(kv_s: Sequence[float], direct_s: Sequence[float]) -> float:
    """100 × (1 − the median of injected / direct over the pairs)."""
    return 100 * (1 - float(np.median(np.asarray(kv_s) / np.asarray(direct_s))))


def speedup_interval(kv_s: Sequence[float], direct_s: Sequence[float]) -> Interval | None:
    """The interval of `speedup_pct`; None for fewer than 6 pairs."""
    interval = median_interval((np.asarray(kv_s) / np.asarray(direct_s)).tolist())
    return None if interval is None else (100 * (1 - interval[1]), 100 * (1 - interval[0]))


def paired_ratio(a_s: Sequence[float], b_s: Sequence[float]) -> tuple[float, Interval | None]:
    """Median of a / b over the pairs, and its interval: drift that hits both arms cancels."""
    ratios = np.asarray(a_s) / np.asarray(b_s)
    return float(np.median(ratios)), median_interval(ratios.tolist())


def median_interval(values: Sequence[float]) -> Interval | None:
    """An interval that holds the median of what `values` are samples of, in order of time, with 96.9%.

    The values are cut into 6 batches of neighbours; the interval is the range of the batches' medians. It supposes no
    distribution, and noise that neighbours share stays within a batch (the method of batch means: Law & Kelton,
    "Simulation Modeling and Analysis", chapter 9, with the sign test's interval in place of Student's). None for fewer
    than 6 values. `python -m experiments.measurement.coverage` simulates how often it holds under seven kinds of noise.
    """
    if len(values) < BATCHES:
        return None
    medians = [float(np.median(batch)) for batch in np.array_split(np.asarray(values), BATCHES)]
    return min(medians), max(medians)
