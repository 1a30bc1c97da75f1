"""What each policy nets of the oracle's seconds, over the budget, one panel for each kind of traffic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from experiments.reporting.plots.base import Plot
from experiments.reporting.theme import Theme, style
from experiments.results import Row, formatting
from experiments.scenarios import reuse_trace

ORACLE = "oracle"


class _Point(NamedTuple):
    """One policy under one budget; the share of the oracle's seconds and its 95% interval in %."""

    policy: str
    traffic: str
    budget_pct: float
    of_oracle_pct: float
    interval: tuple[float, float] | None


class Reuse(Plot):
    """A line a policy with its interval; the default's in the colour of injection."""

    name = "reuse"
    title = "Which memories are kept as KV"
    caption = (
        "Net seconds saved (time to first token saved less builds) as a share of the oracle's, which knows the trace; "
        "the budget is a share of the KV of all memories. Bars are 95% intervals over the traces."
    )
    place = 4

    def draw(self, rows: Sequence[Row], theme: Theme) -> Figure | None:
        points = [
            _Point(
                row.arm,
                row.payload.traffic,
                row.payload.budget_pct,
                row.payload.of_oracle_pct,
                row.payload.of_oracle_interval,
            )
            for row in rows
            if isinstance(row.payload, reuse_trace.ReuseTracePayload)
            if row.payload.of_oracle_pct is not None and row.arm != ORACLE
        ]
        if not points:
            return None
        families = list(dict.fromkeys(point.traffic for point in points))
        policies = list(dict.fromkeys(point.policy for point in points))
        others = iter(
            [(theme.direct, "s"), (theme.ink, "^"), (theme.ramp[1], "D"), (theme.ramp[2], "v")] * len(policies)
        )
        looks = {name: (theme.injected, "o") if name == "benefit_per_byte" else next(others) for name in policies}
        with style(theme):
            figure = Figure(figsize=(3.1 * len(families) + 0.6, 3.5), layout="constrained")
            panels = figure.subplots(1, len(families), squeeze=False, sharey=True)[0]
            for axes, family in zip(panels, families, strict=True):
                for name, (color, marker) in looks.items():
                    of_both = [point for point in points if (point.policy, point.traffic) == (name, family)]
                    line = sorted(of_both, key=lambda point: point.budget_pct)
                    axes.plot(
                        [point.budget_pct for point in line],
                        [point.of_oracle_pct for point in line],
                        color=color,
                        marker=marker,
                        markersize=4.5,
                        linewidth=2.0 if name == "benefit_per_byte" else 1.2,
                    )
                    for point in line:
                        if point.interval:
                            axes.plot([point.budget_pct] * 2, point.interval, color=color)
                axes.set_xscale("log")
                ticks = sorted({point.budget_pct for point in points if point.traffic == family})
                axes.set_xticks(ticks, [formatting.percent(tick) for tick in ticks])
                axes.xaxis.set_minor_locator(NullLocator())
                axes.set_title(family)
                axes.set_xlabel("budget")
            panels[0].set_ylabel("% of the oracle's net seconds")
            handles = [
                Line2D([], [], color=color, marker=marker, label=name) for name, (color, marker) in looks.items()
            ]
            figure.legend(handles=handles, loc="outside upper left", ncols=3)
        return figure
