"""TTFT under load: the middle and the slowest requests of each arm against the rate at which they come."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from experiments.reporting.plots.base import Plot, tick
from experiments.reporting.theme import Theme, style
from experiments.results import Row
from experiments.scenarios import under_load

MARKERS = "^vD<>P*X"
"""Of the arms that have no look of their own."""


class UnderLoad(Plot):
    """p50 solid, p99 dashed, the goal dotted; one panel."""

    name = "under_load"
    title = "Under load"
    caption = (
        "TTFT of requests that arrive at random, from arrival to first token: the median solid, p99 dashed (of fewer "
        "than 100 requests their maximum). The dotted line is the goal that p99 must stay under. A load that was given "
        "up ends early, and its points are lower bounds."
    )
    place = 3

    def draw(self, rows: Sequence[Row], theme: Theme) -> Figure | None:
        loaded = [
            (row.arm, row.payload)
            for row in rows
            if isinstance(row.payload, under_load.UnderLoadPayload) and row.payload.requests_a_second is not None
        ]
        if not loaded:
            return None
        looks = {"direct": (theme.direct, "s"), "injected": (theme.injected, "o")}
        with style(theme):
            figure = Figure(figsize=(6.4, 3.6), layout="constrained")
            axes = figure.subplots()
            handles = []
            for number, arm in enumerate(dict.fromkeys(arm for arm, _ in loaded)):
                known = theme.injected if arm.startswith("injected") else theme.ink
                color, marker = looks.get(arm, (known, MARKERS[number % len(MARKERS)]))
                of_arm = sorted(
                    ((load.requests_a_second or 0.0, load) for name, load in loaded if name == arm),
                    key=lambda pair: pair[0],
                )
                rates = [rate for rate, _ in of_arm]
                for line, times in (
                    ("-", [load.ttft_p50_s or 0.0 for _, load in of_arm]),
                    ("--", [load.ttft_p99_s or 0.0 for _, load in of_arm]),
                ):
                    axes.plot(rates, times, line, color=color, marker=marker, markersize=5, linewidth=1.6)
                handles.append(Line2D([], [], color=color, marker=marker, label=arm))
            axes.axhline(loaded[0][1].goal_ttft_s or 0.0, color=theme.ink, linestyle=":", linewidth=1.2)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.4g}"))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda time, _: tick(time)))
            axes.set_xlabel("requests a second")
            axes.set_ylabel("time to first token")
            figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 4))
        return figure
