"""TTFT under load: the slowest requests of each arm against the rate at which they come."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from experiments.reporting.plots.base import Plot, tick
from experiments.reporting.theme import Theme, style
from experiments.results import Row
from experiments.scenarios import under_load

MARKERS = "^vD<>P*X"
"""Of the arms that have no look of their own."""
LINES = ("-", "--", "-.", ":")


class UnderLoad(Plot):
    """p99 of each arm, hollow where it is a lower bound; the goal dotted; one panel."""

    name = "under_load"
    title = "Under load"
    caption = (
        "p99 TTFT of requests that arrive at random, from arrival to first token (of fewer than 100 requests their "
        "maximum). The dotted line is the goal. A hollow marker is a load that was given up, so a lower bound; the "
        "arm's line leaves it out."
    )
    place = 3

    def draw(self, rows: Sequence[Row], theme: Theme) -> Figure | None:
        loaded = [
            (row.arm, row.payload)
            for row in rows
            if isinstance(row.payload, under_load.UnderLoadPayload) and row.payload.is_measured
        ]
        if not loaded:
            return None
        looks = {"direct": (theme.direct, "s"), "injected": (theme.injected, "o")}
        with style(theme):
            figure = Figure(figsize=(6.4, 3.6), layout="constrained")
            axes = figure.subplots()
            handles = []
            lines: dict[str, int] = {}
            for number, arm in enumerate(dict.fromkeys(arm for arm, _ in loaded)):
                known = theme.injected if arm.startswith("injected") else theme.ink
                color, marker = looks.get(arm, (known, MARKERS[number % len(MARKERS)]))
                lines[color] = lines.get(color, -1) + 1
                line = LINES[lines[color] % len(LINES)]
                points = sorted(
                    (load.requests_a_second or 0.0, load.ttft_p99_s or 0.0, bool(load.given_up))
                    for name, load in loaded
                    if name == arm
                )
                whole = [(rate, p99_s) for rate, p99_s, given_up in points if not given_up]
                axes.plot([rate for rate, _ in whole], [p99_s for _, p99_s in whole], line, color=color)
                for rate, p99_s, given_up in points:
                    fill = "none" if given_up else color
                    axes.plot([rate], [p99_s], marker, color=color, markerfacecolor=fill, markersize=5)
                handles += axes.plot([], [], line, color=color, marker=marker, label=arm)
            axes.axhline(loaded[0][1].goal_ttft_s or 0.0, color=theme.ink, linestyle=":", linewidth=1.2)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.4g}"))
            axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.xaxis.set_minor_formatter(FuncFormatter(lambda rate, _: f"{rate:.4g}"))
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
            for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                set_formatter(FuncFormatter(lambda time, _: tick(time)))
            axes.set_xlabel("requests a second")
            axes.set_ylabel("p99 time to first token")
            figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 4))
        return figure
