"""The speed-up as a heat map, context × query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.reporting.plots.base import Plot, groups, measured
from experiments.reporting.theme import Theme, style
from experiments.results import CHANGED, Row, formatting, labels


class Speedup(Plot):
    """Speed-up in % (and as a factor), context × query; a cell that may not show one says why."""

    name = "speedup"
    title = "Speed-up"
    caption = (
        "How much less engine TTFT is with the memory injected, and as a factor, without fetching and merging. Only "
        "cells whose verdict is ok have one. Where the output changed, the cell says so."
    )
    place = 2

    def draw(self, rows: Sequence[Row], theme: Theme) -> Figure | None:
        ttft_rows = [row for row in rows if row.status == "failed" or measured([row])]
        panels_of = {name: group for name, group in groups(ttft_rows).items() if measured(group)}
        if not panels_of:
            return None
        across = min(len(panels_of), 3)
        down = -(-len(panels_of) // across)
        wide = min(max(len({row.query_tokens for row in group}) for group in panels_of.values()), 8)
        high = max(len({row.context_tokens for row in group}) for group in panels_of.values())
        ramp = LinearSegmentedColormap.from_list("speedup", theme.ramp)
        with style(theme):
            size = (max(1.15 * wide + 1.3, 3.6) * across, (0.52 * high + 1.15) * down)
            figure = Figure(figsize=size, layout="constrained")
            panels = figure.subplots(down, across, squeeze=False).ravel()
            for axes, (name, group) in zip(panels, panels_of.items(), strict=False):
                _heat(axes, group, ramp, theme)
                axes.set_title(name.replace(" · ", "\n"), fontsize=9.5, fontweight="normal", pad=8)
            for axes in panels[len(panels_of) :]:
                axes.set_axis_off()
        return figure


def _heat(axes: Axes, rows: Sequence[Row], ramp: LinearSegmentedColormap, theme: Theme) -> None:
    contexts, queries = _names(rows, "context"), _names(rows, "query")
    columns, lines = list(queries), list(contexts)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for row in rows:
        x, y = columns.index(row.query_tokens), lines.index(row.context_tokens)
        value = labels.shown_speedup(row)
        face: str | tuple[float, float, float, float] = "none"
        text, ink = str(labels.kind(row)), theme.ink
        if value is not None and value < 0:  # slower: the other arm's colour
            face, text, ink = theme.direct, formatting.percent(value), theme.ground
        elif value is not None:
            face = ramp(value / 100)
            red, green, blue, _ = face
            ink = "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "#10141a"
            text = formatting.percent(value) + (f"\n{formatting.times(100 / (100 - value))}" if value < 100 else "")
        if value is not None and row.equality in CHANGED:
            text = f"{labels.GRADES[row.equality]}\n{text}"
        axes.add_patch(
            Rectangle(
                (x - 0.5, y - 0.5),
                1,
                1,
                facecolor=face,
                edgecolor=theme.faint if value is None else theme.ground,
                linewidth=1.5,
                hatch="////" if value is None else None,
            )
        )
        axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=9, linespacing=1.25)
    axes.set_xticks(range(len(queries)), queries.values())
    axes.set_yticks(range(len(contexts)), contexts.values())
    axes.set_xlim(-0.5, len(queries) - 0.5)
    axes.set_ylim(-0.5, len(contexts) - 0.5)
    axes.set_xlabel("query, tokens")
    axes.set_ylabel("memory, tokens")


def _names(rows: Sequence[Row], side: Literal["context", "query"]) -> dict[int, str]:
    """The axis of a heat map: token counts in order, each with its label where it has one beside the count."""
    names: dict[int, str] = {}
    for row in sorted(rows, key=lambda row: getattr(row, f"{side}_tokens")):
        tokens = getattr(row, f"{side}_tokens")
        count, name = formatting.count(tokens), labels.label(row, side).replace(",", "")
        names.setdefault(tokens, count)
        if not name.isdigit():
            names[tokens] = f"{count}\n{name}"
    return names
