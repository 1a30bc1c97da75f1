"""Each way of injecting a memory, as a multiple of the least time that the machine needs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from experiments.reporting.plots.base import Plot
from experiments.reporting.theme import Theme, style
from experiments.results import DIRECT, Row, formatting
from experiments.scenarios import injection_cost

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#b2a100", "#000000")
"""Okabe and Ito's, and greys; markers tell the ways apart where colours don't."""
MARKERS = "osD^v<>Px*"


class OverLimit(Plot):
    """One panel a query length, one line a way; 1 is the limit."""

    name = "over_limit"
    title = "TTFT over the limit"
    caption = (
        "Time to first token of each way, divided by the least time that this hardware needs for the same work. vLLM's "
        "is the lower quartile of its prefix hits, over the limit of the injected query."
    )
    place = 3

    def draw(self, rows: Sequence[Row], theme: Theme) -> Figure | None:
        shown = [row for row in rows if isinstance(row.payload, injection_cost.InjectionCostPayload)]
        if not shown:
            return None
        queries = sorted({row.query_tokens for row in shown})
        with style(theme):
            figure = Figure(figsize=(3.1 * len(queries) + 2.4, 3.6), layout="constrained")
            panels = figure.subplots(1, len(queries), squeeze=False, sharey=True)[0]
            for axes, query in zip(panels, queries, strict=True):
                _panel(axes, [row for row in shown if row.query_tokens == query], theme)
                axes.set_title(f"{formatting.count(query)}-token query")
            panels[0].set_ylabel("TTFT over the limit")
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside right center", fontsize=8)
        return figure


def _panel(axes: Axes, rows: Sequence[Row], theme: Theme) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in sorted(rows, key=lambda row: row.context_tokens):
        figures = row.payload
        if not isinstance(figures, injection_cost.InjectionCostPayload):
            continue
        lines.setdefault(row.arm, []).append((row.context_tokens, figures.over_limit))
        if figures.vllm_quartile_s is not None and row.arm != DIRECT:
            over = figures.vllm_quartile_s / figures.limit_s
            lines.setdefault("vLLM, prefix hit", []).append((row.context_tokens, over))
    for (name, points), color, marker in zip(sorted(lines.items()), cycle(COLORS), cycle(MARKERS), strict=False):
        at, over_limit = zip(*points, strict=True)
        axes.plot(at, over_limit, color=color, marker=marker, markersize=5, linewidth=1.4, label=name)
    axes.axhline(1.0, color=theme.ink, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda over, _: f"{over:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    contexts = sorted({row.context_tokens for row in rows})
    axes.set_xticks(contexts, [formatting.count(tokens) for tokens in contexts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("memory, tokens")
