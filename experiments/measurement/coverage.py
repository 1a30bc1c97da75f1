"""python -m experiments.measurement.coverage: how often an interval holds the true ratio, under seven kinds of noise.

Each repetition draws the times of two arms whose true ratio is known, and computes the interval of the median ratio as
a row's figures do. The share of repetitions whose interval holds the true ratio is the interval's coverage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import rich.box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.measurement.statistics import COVERAGE, median_intervals

Array = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, int, int], tuple[Array, Array]]
Intervals = Callable[[Array], tuple[Array, Array]]
PAIRS = (6, 10, 30)
REPETITIONS = 20_000
LEAST, MOST = 0.92, 0.98
"""Coverage that needs no explanation. Simulated coverage has a standard error of 0.1% at 20,000 repetitions."""
JITTER = 0.02
"""The noise that every call has besides: lognormal, of 2%."""


@dataclass(frozen=True)
class Noise:
    """One kind of noise. `draw` gives the logarithms of two arms' times, each of shape (repetitions, pairs)."""

    kind: str
    detail: str
    draw: Draw
    why: str = ""
    """Why its coverage lies outside `LEAST` to `MOST` for some number of pairs; "" if it must not."""


def _jitter(rng: np.random.Generator, repetitions: int, pairs: int, size: float = JITTER) -> tuple[Array, Array]:
    a, b = size * rng.standard_normal((2, repetitions, pairs))
    return a, b


def _independent(rng: np.random.Generator, repetitions: int, pairs: int) -> tuple[Array, Array]:
    return _jitter(rng, repetitions, pairs, 0.05)


def _outliers(rng: np.random.Generator, repetitions: int, pairs: int) -> tuple[Array, Array]:
    a, b = _jitter(rng, repetitions, pairs)
    hit_a, hit_b = rng.random((2, repetitions, pairs)) < 0.05
    return a + np.log(5) * hit_a, b + np.log(5) * hit_b


def _common_drift(rng: np.random.Generator, repetitions: int, pairs: int) -> tuple[Array, Array]:
    a, b = _jitter(rng, repetitions, pairs)
    drift_N = np.log(1.3) * np.linspace(0, 1, pairs)
    return a + drift_N, b + drift_N


def _own_drift(rng: np.random.Generator, repetitions: int, pairs: int) -> tuple[Array, Array]:
    a, b = _jitter(rng, repetitions, pairs)
    phase = rng.random((repetitions, 1))
    return a + 0.05 * np.sin(2 * np.pi * (phase + np.arange(pairs) / (3 * pairs))), b


def _correlated(rng: np.random.Generator, repetitions: int, pairs: int, correlation: float) -> Array:
    """An autoregressive series of order 1 with standard deviation 1."""
    steps = rng.standard_normal((repetitions, pairs))
    series = np.empty_like(steps)
    series[:, 0] = steps[:, 0]
    for i in range(1, pairs):
        series[:, i] = correlation * series[:, i - 1] + np.sqrt(1 - correlation**2) * steps[:, i]
    return series


def _common_correlated(rng: np.random.Generator, repetitions: int, pairs: int) -> tuple[Array, Array]:
    a, b = _jitter(rng, repetitions, pairs)
    common = 0.1 * _correlated(rng, repetitions, pairs, 0.8)
    return a + common, b + common


def _own_correlated(rng: np.random.Generator, repetitions: int, pairs: int) -> tuple[Array, Array]:
    a, b = _jitter(rng, repetitions, pairs)
    return a + 0.05 * _correlated(rng, repetitions, pairs, 0.5), b


def _periodic(rng: np.random.Generator, repetitions: int, pairs: int) -> tuple[Array, Array]:
    """Another program is busy for a quarter of each 5.3 rounds. The arms of a round run one after the other, in random
    order."""
    a, b = _jitter(rng, repetitions, pairs)
    first = rng.random((repetitions, pairs)) < 0.5
    phase = rng.random((repetitions, 1))
    starts = np.arange(pairs) / 5.3 + phase
    busy_first, busy_second = (starts % 1 < 0.25), ((starts + 0.5 / 5.3) % 1 < 0.25)
    slow = np.log(1.2)
    return (
        a + slow * np.where(first, busy_first, busy_second),
        b + slow * np.where(first, busy_second, busy_first),
    )


def _two_clocks(rng: np.random.Generator, repetitions: int, pairs: int) -> tuple[Array, Array]:
    a, b = _jitter(rng, repetitions, pairs)
    low_a, low_b = rng.random((2, repetitions, pairs)) < 0.5
    return a + 0.1 * low_a, b + 0.1 * low_b


def _clock_steps(rng: np.random.Generator, repetitions: int, pairs: int) -> tuple[Array, Array]:
    a, b = _jitter(rng, repetitions, pairs)
    step = 0.1 * (np.arange(pairs) >= rng.integers(1, pairs, (repetitions, 1)))
    return a + step, b + step


NOISES = (
    Noise("independent", "lognormal, 5%", _independent),
    Noise("outliers", "5% of the calls take five times as long", _outliers),
    Noise("common drift", "both arms slow down by 30%", _common_drift),
    Noise(
        "own drift",
        "one arm alone moves slowly by 5%",
        _own_drift,
        "A slow drift of one arm alone cannot be told from an effect within one run. Only runs at other times show it.",
    ),
    Noise("correlated, common", "AR(1) of 0.8 in both arms, 10%", _common_correlated),
    Noise(
        "correlated, own",
        "AR(1) of 0.5 in one arm, 5%",
        _own_correlated,
        "Few pairs hold hardly more than one batch of noise that neighbours share. A figure to publish has 30 pairs.",
    ),
    Noise("periodic", "busy for a quarter of each 5.3 rounds, 20%", _periodic),
    Noise("two clocks", "each call at one of two clocks, 10% apart", _two_clocks),
    Noise("clock steps", "the clock of both arms falls by 10% once", _clock_steps),
)


def coverage(
    noise: Noise,
    pairs: int,
    repetitions: int = REPETITIONS,
    seed: int = 0,
    intervals: Intervals = median_intervals,
) -> float:
    """The share of `repetitions` runs of `pairs` pairs whose interval holds the true ratio, which is 1.

    intervals: of ratios (repetitions, pairs), the lower and the upper ends (repetitions,).
    """
    a, b = noise.draw(np.random.default_rng(seed), repetitions, pairs)
    low, high = intervals(np.exp(a - b))
    return float(np.mean((low <= 1) & (high >= 1)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table. Returns 1 if a coverage lies outside the bounds and its noise does not say why."""
    parser = argparse.ArgumentParser(prog="python -m experiments.measurement.coverage", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=REPETITIONS, metavar="N", help=f"default: {REPETITIONS}")
    chosen = parser.parse_args(arguments)
    table = Table(
        title=Text(f"Coverage of an interval of {COVERAGE:.1%}", "bold"),
        caption=Text(f"{chosen.repetitions:,} repetitions. * outside {LEAST:.0%} to {MOST:.0%}, and why below."),
        title_justify="left",
        caption_justify="left",
        box=rich.box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    table.add_column("Noise")
    table.add_column("What it is")
    for pairs in PAIRS:
        table.add_column(f"{pairs} pairs", justify="right")
    reasons, unexplained = [], False
    for noise in NOISES:
        shares = [coverage(noise, pairs, chosen.repetitions) for pairs in PAIRS]
        outside = [not LEAST <= share <= MOST for share in shares]
        cells = [f"{share:.1%}{'*' if out else ' '}" for share, out in zip(shares, outside, strict=True)]
        table.add_row(noise.kind, noise.detail, *cells)
        if any(outside):
            reasons.append(f"* {noise.kind}: {noise.why or 'no reason is known.'}")
            unexplained |= not noise.why
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table, *map(Text, reasons), sep="\n")
    return int(unexplained)


if __name__ == "__main__":
    sys.exit(main())
