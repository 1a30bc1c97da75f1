"""Fits an engine's efficiencies to measured rows, and computes the errors on held-out cells."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares

from experiments.performance_model.predictor import Engine, Layout, Prefill
from experiments.results import Row
from kvmem.errors import ConfigError

SHARES = ("products", "attention", "bandwidth", "interconnect", "host_link")
DEFAULTS_WEIGHT = 0.05
"""The weight of each share's logarithmic distance from its default. It only decides shares that no row determines."""
MIN_S, MAX_S = 1e-5, 1.0
"""Bounds of the fitted times."""


class Point(NamedTuple):
    """One measured TTFT, with the work and the layout that it belongs to."""

    cell: tuple[int, int]
    arm: str
    layout: Layout
    prefill: Prefill
    seconds: float


@dataclass(frozen=True)
class Fit:
    """The fitted efficiencies, the points that they are fitted to, and the points of the other cells."""

    engine: Engine
    fitted: tuple[Point, ...]
    held_out: tuple[Point, ...]

    def errors(self, points: Sequence[Point]) -> list[float]:
        """The signed relative errors, predicted / measured − 1."""
        return [point.layout.ttft_s(point.prefill, self.engine) / point.seconds - 1 for point in points]


def points_of(row: Row, layout: Layout) -> list[Point]:
    """The measured prefills of a row. `layout` is the one that it was measured on."""
    cell = (row.context_tokens, row.query_tokens)
    return [
        Point(cell, timed.arm, layout, Prefill(timed.new_tokens, timed.cached_tokens, timed.moved_bytes), timed.seconds)
        for timed in (row.payload.prefills(row) if row.payload else [])
    ]


def halves(points: Sequence[Point], seed: int) -> tuple[list[Point], list[Point]]:
    """Divides the points: those of half of the cells, chosen at random, and those of the other cells."""
    cells = sorted({point.cell for point in points})
    chosen = set(random.Random(seed).sample(cells, math.ceil(len(cells) / 2)))
    return [p for p in points if p.cell in chosen], [p for p in points if p.cell not in chosen]


def fit_engine(points: Sequence[Point], seed: int = 0) -> Fit:
    """Fits the efficiencies by least squares of the logarithmic errors, over half of the cells.

    Raises ConfigError for fewer than four cells.
    """
    fitted, held_out = halves(points, seed)
    if len({point.cell for point in points}) < 4:
        raise ConfigError("A fit needs at least four measured cells. Add runs with more cells to scenario.fit_from.")
    default = Engine()
    start = [math.log(getattr(default, name)) for name in SHARES]

    def residuals(knobs: np.ndarray) -> list[float]:
        engine = _engine(knobs)
        off = [math.log(p.layout.ttft_s(p.prefill, engine) / p.seconds) for p in fitted]
        return off + [DEFAULTS_WEIGHT * (knob - at) for knob, at in zip(knobs, start, strict=False)]

    span = [math.log(MIN_S)] * 2, [math.log(MAX_S)] * 2
    bounds = [math.log(0.02)] * len(SHARES) + span[0], [0.0] * len(SHARES) + span[1]
    # Either kernel launches or the GPU's work can dominate. The fit starts from both assumptions and keeps the better.
    tried = [
        least_squares(residuals, [*start, math.log(0.003), math.log(launches_s)], bounds=bounds)
        for launches_s in (2e-5, median(p.seconds for p in fitted) / 2)
    ]
    return Fit(_engine(min(tried, key=lambda found: found.cost).x), tuple(fitted), tuple(held_out))


def _engine(knobs: np.ndarray) -> Engine:
    *shares, fixed_s, launches_s = (math.exp(knob) for knob in knobs)
    return Engine(**dict(zip(SHARES, shares, strict=True)), fixed_s=fixed_s, launches_s=launches_s)
