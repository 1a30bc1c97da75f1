"""report.html: rows as a page that stands alone. What is shown is chosen here, how it looks in report.html.j2."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from experiments.measurement import statistics
from experiments.reporting import findings, plots, tables
from experiments.reporting.between_runs import Spread
from experiments.reporting.headline import headline
from experiments.reporting.theme import DARK, LIGHT
from experiments.results import AnswerPayload, Row, Run, TTFTPayload, formatting, labels, ttft_of, user_speedup

TEMPLATE = Path(__file__).with_name("report.html.j2")
IN_SHORT = ("machine", "cuda", "torch", "transformers", "vllm", "graphs", "commit")
_OF_THE_ROW = ("pairs", "memories", "first_difference", "logit_max_abs_diff", "near_tie_margin")
_CALLED = {
    "kv_ttft_s": "engine TTFT, injected",
    "direct_ttft_s": "engine TTFT, direct",
    "kv_bytes": "KV size",
    "kv_user_ttft_s": "user TTFT, injected",
    "direct_user_ttft_s": "user TTFT, direct",
    "limit_s": "limit, injected",
    "direct_limit_s": "limit, direct",
    "mfu": "MFU, injected",
    "kv_ttft_p90_s": "p90, injected",
    "direct_ttft_p90_s": "p90, direct",
    "logit_max_abs_diff": "largest logit difference",
    "first_difference": "first token that differs",
}


@dataclass(frozen=True)
class Plot:
    title: str
    caption: str
    light: str
    dark: str


@dataclass(frozen=True)
class CellView:
    """A row with all its figures and both answers; `bars` are (arm, its user TTFT as text, time and limit in % of the
    longer arm's time)."""

    title: str
    row: Row
    kind: str
    verdict: labels.Label
    equality: labels.Label
    speedup_pct: float | None
    user_pct: float | None
    figures: list[tuple[str, str]]
    bars: list[tuple[str, str, float, float | None]]
    question: str | None
    truth: str | None
    answers: Mapping[str, str]
    speedup_interval: tuple[float, float] | None
    interval_name: str


def render(rows: Sequence[Row], runs: Sequence[Run], spread: Spread | None = None) -> str:
    """The page, as HTML that fetches nothing: its plots are inside. spread: between the run and its repeats."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        name: getattr(formatting, name) for name in ("seconds", "percent", "percent_range", "count")
    }
    environment.filters["zip"] = zip
    environment.filters["width"] = _width
    head, arms = headline(rows), [name for name in labels.varying(rows) if name in ("tier", "arm")]
    predicted = bool(rows) and all(map(labels.is_prediction, rows))
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=" · ".join(dict.fromkeys(row.model for row in rows)) or "an empty run",
        models=list(dict.fromkeys(row.model for row in rows)),
        runs=runs,
        rows=rows,
        head=head,
        best=cell(head.row, arms) if head else None,
        predicted=predicted,
        break_even=_break_even(rows),
        kinds=Counter(labels.kind(row) for row in rows),
        grades=[(name, Counter(row.equality for row in rows)[grade]) for grade, name in labels.GRADES.items()],
        summary=labels.summary(rows),
        in_short=in_short([row for row in rows if predicted or not labels.is_prediction(row)]),
        conditions=conditions(rows),
        tables=[tables.compact(table) for table in tables.tables(rows)],
        plots=_plots(rows),
        spread=spread,
        question=findings.question(rows),
        answer=findings.answer(rows),
        cells=[] if predicted else [cell(row, arms) for row in rows if row.status != "failed"],
        failed=[cell(row, arms) for row in rows if row.status == "failed"],
        last_line=labels.last_line,
    )


def _width(table: tables.Table) -> int:
    """About how many pixels a table needs, for browsers that can't tell whether it scrolls."""
    cells = zip(table.columns, *(line.cells for line in table.lines), strict=True)
    longest = [max(len(text) for text in column[1:]) for column in cells if column[0] != "Verdict"]
    return sum(8 * letters + 16 for letters in longest) + 110


def _break_even(rows: Sequence[Row]) -> str:
    """After how many queries the builds of the valid cells have paid for themselves; "" if there is none."""
    valid = [figures for row in rows if labels.kind(row) == "ok" and (figures := ttft_of(row))]
    pay = [figures.break_even_queries for figures in valid if figures.break_even_queries is not None]
    never = f"never in {len(valid) - len(pay)} of {formatting.plural(len(valid), 'cell')}"
    if not pay:
        return never if valid else ""
    most = f"{'at most ' if len(pay) > 1 else ''}{formatting.digits(max(pay))} queries"
    return most if len(pay) == len(valid) else f"{most}; {never}"


def _plots(rows: Sequence[Row]) -> list[Plot]:
    light, dark = plots.draw(rows, LIGHT), plots.draw(rows, DARK)
    return [
        Plot(plot.title, plot.caption, _uri(plots.svg(light[plot.name], LIGHT)), _uri(plots.svg(dark[plot.name], DARK)))
        for plot in plots.every()
        if plot.name in light
    ]


def _uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def cell(row: Row, arms: Sequence[str] = ()) -> CellView:
    """A row as a block of the page: every figure that it has, in words and units.

    arms: the conditions that tell the rows of one cell apart, which its title then names.
    """
    own = row.payload.figures() if row.payload else {}
    if row.verdict != "ok":  # a speed-up is shown only where the verdict stands behind it
        own = {key: value for key, value in own.items() if not key.startswith("speedup")}
    values = {name: getattr(row, name) for name in _OF_THE_ROW} | own
    named = {key: value for key, value in values.items() if value is not None and not isinstance(value, str)}
    figures = [
        (_CALLED.get(key, formatting.heading(key)), formatting.by_name(key, value)) for key, value in named.items()
    ]
    ttft = ttft_of(row)
    times = _user_times(ttft) if ttft else []
    longest = max((user_s for _, user_s, _ in times), default=0.0)
    bars = [
        (
            arm,
            formatting.seconds(user_s),
            100 * user_s / longest,
            100 * limit_s / longest if limit_s is not None else None,
        )
        for arm, user_s, limit_s in times
    ]
    answered = row.payload if isinstance(row.payload, AnswerPayload) else None
    parts = [labels.label(row, "context"), labels.label(row, "query")]
    sizes = f"{formatting.count(row.context_tokens)} tokens of memory, {formatting.count(row.query_tokens)} of query"
    sizes_told = "" if all(part.replace(",", "").isdigit() for part in parts) else f"{' / '.join(parts)}: "
    title = f"{sizes_told}{sizes}" if row.context_tokens or row.query_tokens else row.scenario
    told = list(dict.fromkeys(str(labels.condition(row, name)) for name in arms))
    return CellView(
        " · ".join([title, *told]),
        row,
        labels.kind(row),
        labels.verdict(row),
        labels.equality(row),
        labels.shown_speedup(row),
        user_speedup(row),
        figures,
        bars,
        answered.question if answered else None,
        answered.truth if answered else None,
        answered.answers if answered else {},
        ttft.speedup_interval if ttft else None,
        statistics.interval_name([row.rules]),
    )


def _user_times(figures: TTFTPayload) -> list[tuple[str, float, float | None]]:
    return [
        ("direct", figures.direct_user_ttft_s, figures.direct_limit_s),
        ("injected", figures.kv_user_ttft_s, figures.limit_s),
    ]


def in_short(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The conditions that a reader needs to judge the figures by: a few, all of them in `conditions`."""
    known = dict(conditions(rows))
    predicted = bool(rows) and all(map(labels.is_prediction, rows))
    if predicted:
        return [(name, known[name]) for name in ("model", "dtype", "hardware") if name in known]
    names = ["model", *(name for name in labels.CONDITIONS if name not in ("arm", "memories")), *IN_SHORT]
    return [(name, known[name]) for name in names if name in known]


def conditions(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Every condition of every row: its value, the range of a number that moved, or the different values."""
    seen: dict[str, list[Any]] = {}
    for row in rows:
        fields = {name: getattr(row, name) for name in ("model", *labels.CONDITIONS)}
        for name, value in (_flat(fields) | _flat(row.conditions)).items():
            seen.setdefault(name, []).append(value)
    return [(name, _values(values)) for name, values in seen.items()]


def _flat(fields: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{above}{key} ")
        elif isinstance(value, (list, tuple)):
            flat |= _flat({str(index): entry for index, entry in enumerate(value)}, f"{above}{key} ")
        elif value is not None and value != "":
            flat[f"{above}{key}"] = value
    return flat


def _values(values: Sequence[Any]) -> str:
    different = list(dict.fromkeys(values))
    if len(different) > 1 and {type(value) for value in different} <= {int, float}:
        return f"{formatting.by_name('', min(different))} to {formatting.by_name('', max(different))}"
    return ", ".join(formatting.by_name("", value) for value in different)
