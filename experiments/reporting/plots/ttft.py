"""TTFT against context, one panel a query length.

Blue circles are the injected arm, orange squares the direct one, dashes the roofline's limit: told apart by shape as
well as by colour (Okabe and Ito's palette, safe for colour-blind readers). Invalid cells are hollow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from textwrap import fill
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from experiments.reporting.plots.base import Plot, groups, measured, tick
from experiments.reporting.theme import Theme, style
from experiments.results import ArmTimes, Row, formatting, labels, ttft_of

MOST_PANELS = 6
"""Query lengths with a panel of their own; beyond that (a dialogue, say) all share one."""
LEGEND_IN, LETTERS_AN_IN = 1.9, 12
"""How many inches an entry of the legend takes, and how many letters of a heading fit an inch."""


class TTFT(Plot):
    """Engine TTFT against context tokens: one panel a query length, one line of panels a model and run."""

    name = "ttft"
    title = "Time to first token"
    caption = (
        "Engine TTFT against the memory's length, one panel for each query length. Markers are medians, the faint dots "
        "behind them every sample, dashes the least time that this hardware can take."
    )
    place = 1

    def draw(self, rows: Sequence[Row], theme: Theme) -> Figure | None:
        lines_of = {name: _queries(group) for name, group in groups(measured(rows)).items()}
        if not lines_of:
            return None
        wide = max(len(queries) for queries in lines_of.values())
        with style(theme):
            handles, across_in = _legend(rows, theme), max(3.3 * wide, 5.6) + 0.4
            columns = min(len(handles), int(across_in / LEGEND_IN))
            high_in = 2.75 * len(lines_of) + 0.55 + 0.2 * -(-len(handles) // columns)
            figure = Figure(figsize=(across_in, high_in), layout="constrained")
            lines = figure.subfigures(len(lines_of), 1, squeeze=False, hspace=0.02)[:, 0]
            for number, (subfigure, (name, queries)) in enumerate(zip(lines, lines_of.items(), strict=True)):
                subfigure.set_facecolor("none")
                subfigure.suptitle(
                    fill(name, int(across_in * LETTERS_AN_IN)), x=0.01, ha="left", fontsize=9.5, color=theme.ink
                )
                panels = subfigure.subplots(1, wide, squeeze=False, sharey=True)[0]
                for axes, (query, group) in zip(panels, queries.items(), strict=False):
                    _arm(axes, group, "direct", theme.direct, "s")
                    _arm(axes, group, "injected", theme.injected, "o")
                    axes.set_title(query)
                    axes.tick_params(labelleft=True)
                    if number == len(lines_of) - 1:
                        axes.set_xlabel("memory, tokens")
                _scale(panels[0], [row for group in queries.values() for row in group])
                for axes, group in list(zip(panels, queries.values(), strict=False))[1:]:
                    _scale(axes, [row for group in queries.values() for row in group])
                for axes in panels[len(queries) :]:
                    axes.set_axis_off()
                panels[0].set_ylabel("time to first token")
            figure.legend(handles=handles, loc="outside upper left", ncols=columns, columnspacing=1.6)
        return figure


def _queries(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by query length, shortest first; under one name where there are more than `MOST_PANELS` of them."""
    by_query: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.query_tokens):
        tokens, name = formatting.count(row.query_tokens), labels.label(row, "query")
        by_query.setdefault(f"{tokens}-token query" + (f" ({name})" if name != tokens else ""), []).append(row)
    if len(by_query) <= MOST_PANELS:
        return by_query
    least, most = (formatting.count(limit(row.query_tokens for row in rows)) for limit in (min, max))
    return {f"queries of {least} to {most} tokens": list(rows)}


def _arm(axes: Axes, rows: Sequence[Row], arm: Literal["direct", "injected"], color: str, marker: str) -> None:
    """One arm: its median over the contexts with every sample faint behind it, and its limit dashed."""
    by_context = sorted(rows, key=lambda row: row.context_tokens)
    timed: list[tuple[Row, ArmTimes]] = [
        (row, figures.direct_arm if arm == "direct" else figures.kv_arm)
        for row in by_context
        if (figures := ttft_of(row))
    ]
    contexts = [row.context_tokens for row, _ in timed]
    axes.plot(contexts, [times.ttft_s for _, times in timed], color=color, linewidth=1.8, zorder=3)
    for row, times in timed:
        axes.scatter(
            [row.context_tokens] * len(times.samples_s),
            times.samples_s,
            s=9,
            color=color,
            alpha=0.28,
            linewidths=0,
            zorder=2,
        )
        face = "none" if labels.kind(row) != "ok" else color
        axes.plot(row.context_tokens, times.ttft_s, marker, color=color, markerfacecolor=face, markersize=6, zorder=4)
    limits = [(row.context_tokens, times.limit_s) for row, times in timed if times.limit_s is not None]
    if limits:
        at, least_s = zip(*limits, strict=True)
        axes.plot(at, least_s, color=color, linewidth=1.2, linestyle=(0, (4, 3)), marker="_", markersize=7, zorder=2)


def _scale(axes: Axes, rows: Sequence[Row]) -> None:
    """Logarithmic where a linear axis would squeeze the small ones; a tick at every context that was measured."""
    contexts = sorted({row.context_tokens for row in rows})
    if len(contexts) == 1:
        axes.set_xlim(contexts[0] * 0.7, contexts[0] * 1.3 + 1)
    log = contexts[0] > 0 and contexts[-1] > 3 * contexts[0]
    at = [math.log(tokens) if log else tokens for tokens in contexts]
    if all(right - left > 0.12 * (at[-1] - at[0]) for left, right in itertools.pairwise(at)):
        axes.set_xscale("log" if log else "linear")
        axes.xaxis.set_major_locator(FixedLocator(contexts))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: formatting.count(round(tokens))))
    axes.margins(x=0.08)
    arms = [arm for row in rows if (figures := ttft_of(row)) for arm in (figures.kv_arm, figures.direct_arm)]
    times = [arm.ttft_s for arm in arms]
    if min(times) > 0 and max(times) > 5 * min(times):
        axes.set_yscale("log")
        limits = [arm.limit_s for arm in arms if arm.limit_s]
        wide = max(times) > 300 * min(times + limits)
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda time, _: tick(time)))


def _legend(rows: Sequence[Row], theme: Theme) -> list[Line2D]:
    handles = [
        Line2D([], [], color=theme.direct, marker="s", label="sent as prompt text"),
        Line2D([], [], color=theme.injected, marker="o", label="memory injected"),
    ]
    if any((figures := ttft_of(row)) and figures.limit_s is not None for row in rows):
        handles.append(Line2D([], [], color=theme.ink, linestyle=(0, (4, 3)), linewidth=1.2, label="hardware's limit"))
    if any(labels.kind(row) in ("invalid", "undecided") for row in rows):
        hollow: dict[str, Any] = {"marker": "o", "markerfacecolor": "none", "linestyle": "none"}
        handles.append(Line2D([], [], color=theme.ink, label="not ok", **hollow))
    return handles
