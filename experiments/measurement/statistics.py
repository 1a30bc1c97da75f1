"""Medians of paired samples and intervals that hold under drift, outliers and correlated noise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

NOISY_SPREAD = 0.25
"""A run in which an arm's interquartile range exceeds this share of its median was disturbed, and is repeated."""
BATCHES = 6
"""An interval is the range of so many batch medians, and fewer pairs than this have none."""
COVERAGE = 1 - 2 * 0.5**BATCHES
"""Of such an interval, 96.9%: all of `BATCHES` independent medians lie on one side of the true one with 2 × 0.5^6."""
Interval = tuple[float, float]


def interval_name(rules: Iterable[int]) -> str:
    """What a table calls the intervals of rows with verdicts by these versions of the rules.

    >>> interval_name([2]), interval_name([0]), interval_name([0, 2])
    ('96.9% interval', '95% interval', 'Interval')
    """
    versions = {version >= 2 for version in rules}  # before, it was a bootstrap interval of 95%
    if len(versions) != 1:
        return "Interval"
    return f"{COVERAGE:.1%} interval" if versions.pop() else "95% interval"


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
    low_R, high_R = median_intervals(np.asarray(values, dtype=np.float64)[None])
    return float(low_R[0]), float(high_R[0])


def median_intervals(values_RN: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The lower and the upper ends of `median_interval` for each of R runs of N values, at least 6."""
    batches = np.array_split(values_RN, BATCHES, axis=1)
    medians_RB = np.stack([np.median(batch, axis=1) for batch in batches], axis=1)
    return medians_RB.min(axis=1), medians_RB.max(axis=1)
