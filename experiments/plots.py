"""Rows as pictures: TTFT against context for each query length, and the speed-up as a heat map.

Blue circles are the injected arm, orange squares the direct one, dashes the roofline's limit: told apart by shape as
well as by colour (Okabe and Ito's palette, safe for colour-blind readers). Invalid cells are hollow, without speed-up.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from experiments import describe, units
from experiments.row import Row
from experiments.theme import LIGHT, Theme, style

MOST_PANELS = 6
"""Query lengths with a panel of their own; beyond that (a dialogue, say) all share one."""


def _groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that belong in one line of panels: one scenario, model and set of conditions."""
    names = [name for name in describe.varying(rows) if name not in ("dtype", "hardware")]
    several = len({row.scenario for row in rows}) > 1
    groups: dict[str, list[Row]] = {}
    for row in rows:
        parts = [row.scenario] * several + [row.model, row.dtype, row.hardware]
        parts += [f"{name} {value}" for name in names if (value := describe.condition(row, name)) is not None]
        groups.setdefault(" · ".join(filter(None, parts)), []).append(row)
    return groups


def _measured(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.kv_ttft_s is not None or row.direct_ttft_s is not None]


def _queries(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by query length, shortest first; under one name where there are more than `MOST_PANELS` of them."""
    by_query: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.query_tokens):
        tokens, name = units.count(row.query_tokens), describe.label(row, "query")
        by_query.setdefault(f"{tokens}-token query" + (f" ({name})" if name != tokens else ""), []).append(row)
    if len(by_query) <= MOST_PANELS:
        return by_query
    least, most = (units.count(limit(row.query_tokens for row in rows)) for limit in (min, max))
    return {f"queries of {least} to {most} tokens": list(rows)}


def _arm(axes: Axes, rows: Sequence[Row], field: str, color: str, marker: str) -> None:
    """One arm: its median over the contexts with every sample faint behind it, and its limit dashed."""
    timed = sorted((row for row in rows if getattr(row, field) is not None), key=lambda row: row.context_tokens)
    contexts = [row.context_tokens for row in timed]
    axes.plot(contexts, [getattr(row, field) for row in timed], color=color, linewidth=1.8, zorder=3)
    for row in timed:
        samples = row.extra.get(field.replace("_s", "_all_s")) or []
        axes.scatter([row.context_tokens] * len(samples), samples, s=9, color=color, alpha=0.28, linewidths=0, zorder=2)
        face = "none" if describe.kind(row) == "invalid" else color
        axes.plot(
            row.context_tokens, getattr(row, field), marker, color=color, markerfacecolor=face, markersize=6, zorder=4
        )
    limits = [(row.context_tokens, limit) for row in timed if (limit := _limit_s(row, field)) is not None]
    if limits:
        at, least_s = zip(*limits, strict=True)
        axes.plot(at, least_s, color=color, linewidth=1.2, linestyle=(0, (4, 3)), marker="_", markersize=7, zorder=2)


def _limit_s(row: Row, field: str) -> float | None:
    return row.limit_s if field == "kv_ttft_s" else row.extra.get("direct_limit_s")


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
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: units.count(round(tokens))))
    axes.margins(x=0.08)
    times = [time for row in rows for time in (row.kv_ttft_s, row.direct_ttft_s) if time]
    if min(times) > 0 and max(times) > 5 * min(times):
        axes.set_yscale("log")
        limits = [limit for row in rows for limit in (row.limit_s, row.extra.get("direct_limit_s")) if limit]
        wide = max(times) > 300 * min(times + limits)
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda time, _: _tick(time)))


def _tick(time_s: float) -> str:
    """A round time without the digits that a figure has: 50 ms, 2 s, 0.25 s."""
    if time_s <= 0:
        return "0" if time_s == 0 else ""
    scale, unit = (1, "s") if time_s >= 1 else (1e3, "ms") if time_s >= 1e-3 else (1e6, "µs")
    return f"{time_s * scale:.4g} {unit}"


def ttft(rows: Sequence[Row], theme: Theme = LIGHT) -> Figure | None:
    """Engine TTFT against context tokens: one panel a query length, one line of panels a model and run."""
    groups = {name: _queries(group) for name, group in _groups(_measured(rows)).items()}
    if not groups:
        return None
    wide = max(len(queries) for queries in groups.values())
    with style(theme):
        figure = Figure(figsize=(max(3.3 * wide, 5.6) + 0.4, 2.75 * len(groups) + 0.75), layout="constrained")
        lines = figure.subfigures(len(groups), 1, squeeze=False, hspace=0.02)[:, 0]
        for number, (subfigure, (name, queries)) in enumerate(zip(lines, groups.items(), strict=True)):
            subfigure.set_facecolor("none")
            subfigure.suptitle(name, x=0.01, ha="left", fontsize=9.5, color=theme.ink)
            panels = subfigure.subplots(1, wide, squeeze=False, sharey=True)[0]
            for axes, (query, group) in zip(panels, queries.items(), strict=False):
                _arm(axes, group, "direct_ttft_s", theme.direct, "s")
                _arm(axes, group, "kv_ttft_s", theme.injected, "o")
                axes.set_title(query)
                axes.tick_params(labelleft=True)
                if number == len(groups) - 1:
                    axes.set_xlabel("memory, tokens")
            _scale(panels[0], [row for group in queries.values() for row in group])
            for axes, group in list(zip(panels, queries.values(), strict=False))[1:]:
                _scale(axes, [row for group in queries.values() for row in group])
            for axes in panels[len(queries) :]:
                axes.set_axis_off()
            panels[0].set_ylabel("time to first token")
        figure.legend(handles=_legend(rows, theme), loc="outside upper left", ncols=5, columnspacing=1.6)
    return figure


def _legend(rows: Sequence[Row], theme: Theme) -> list[Line2D]:
    handles = [
        Line2D([], [], color=theme.direct, marker="s", label="sent as prompt text"),
        Line2D([], [], color=theme.injected, marker="o", label="memory injected"),
    ]
    if any(row.limit_s is not None for row in rows):
        handles.append(Line2D([], [], color=theme.ink, linestyle=(0, (4, 3)), linewidth=1.2, label="hardware's limit"))
    if any(describe.kind(row) == "invalid" for row in rows):
        hollow: dict[str, Any] = {"marker": "o", "markerfacecolor": "none", "linestyle": "none"}
        handles.append(Line2D([], [], color=theme.ink, label="invalid", **hollow))
    return handles


def speedup(rows: Sequence[Row], theme: Theme = LIGHT) -> Figure | None:
    """Speed-up in % (and as a factor), context × query; a cell that may not show one says why."""
    ttft_rows = [row for row in rows if row.status == "failed" or _measured([row])]
    groups = {name: group for name, group in _groups(ttft_rows).items() if _measured(group)}
    if not groups:
        return None
    across = min(len(groups), 3)
    down = -(-len(groups) // across)
    wide = min(max(len({row.query_tokens for row in group}) for group in groups.values()), 8)
    high = max(len({row.context_tokens for row in group}) for group in groups.values())
    ramp = LinearSegmentedColormap.from_list("speedup", theme.ramp)
    with style(theme):
        size = (max(1.15 * wide + 1.3, 3.6) * across, (0.52 * high + 1.15) * down)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(down, across, squeeze=False).ravel()
        for axes, (name, group) in zip(panels, groups.items(), strict=False):
            _heat(axes, group, ramp, theme)
            axes.set_title(name.replace(" · ", "\n"), fontsize=9.5, fontweight="normal", pad=8)
        for axes in panels[len(groups) :]:
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
        value = describe.shown_speedup(row)
        face: str | tuple[float, float, float, float] = "none"
        text, ink = str(describe.kind(row)), theme.ink
        if value is not None and value < 0:  # slower: the other arm's colour
            face, text, ink = theme.direct, units.percent(value), theme.ground
        elif value is not None:
            face = ramp(value / 100)
            red, green, blue, _ = face
            ink = "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "#10141a"
            text = units.percent(value) + (f"\n{units.times(100 / (100 - value))}" if value < 100 else "")
        axes.add_patch(
            Rectangle(
                (x - 0.5, y - 0.5), 1, 1, facecolor=face, edgecolor=theme.faint if value is None else theme.ground,
                linewidth=1.5, hatch="////" if value is None else None,
            )
        )  # fmt: skip
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
        count, name = units.count(tokens), describe.label(row, side).replace(",", "")
        names.setdefault(tokens, count)
        if not name.isdigit():
            names[tokens] = f"{count}\n{name}"
    return names


def draw(rows: Sequence[Row], theme: Theme = LIGHT) -> dict[str, Figure]:
    """Every plot that these rows have figures for, by the name of its file."""
    figures = {"ttft": ttft(rows, theme), "speedup": speedup(rows, theme)}
    return {name: figure for name, figure in figures.items() if figure is not None}


def svg(figure: Figure, theme: Theme) -> bytes:
    """A figure on a transparent ground, the same bytes for the same rows."""
    target = io.BytesIO()
    with style(theme):
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    return target.getvalue()


def write_plots(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes a PNG of every plot into `folder`, which is made; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in draw(rows).items():
        paths.append(folder / f"{name}.png")
        with style(LIGHT):
            figure.savefig(paths[-1], dpi=160)
    return paths
