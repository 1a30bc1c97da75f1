"""Rows as tables: one `Table`, rendered as Markdown, for the terminal, or by report.html.

A speed-up is shown only where the verdict is ok. Published rows of the same model and cell stand right below ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import rich.box
import rich.console
import rich.table
from rich.text import Text

from experiments.measurement import MAX_DIRECT_RATIO, statistics
from experiments.results import (
    Kind,
    Label,
    Row,
    caption,
    condition,
    equality,
    formatting,
    kind,
    label,
    published,
    shown_speedup,
    summary,
    ttft_of,
    varying,
    verdict,
)
from experiments.results.published import PublishedRow

_ROW_FIELDS = {field.name for field in dataclasses.fields(Row)}
_HEADINGS = {"arm": "Arm", "attention": "Attention", "run": "Run"}
_USER_COLUMNS = ("Merge time", "KV user TTFT", "Dir user TTFT")
"""Shown where several memories are merged, for a merge's seconds are in the user's TTFT and not in the engine's."""
_ENGINE_COLUMNS = ("Build", "KV TTFT", "Dir TTFT")
_TEXT_COLUMNS = {"Model", "Ctx", "Qry", "Equality", "Verdict"}


@dataclass(frozen=True)
class Line:
    """One row of a table, as text; `speedup_pct` only where it may be shown, for a bar beside it."""

    kind: Kind
    cells: tuple[str, ...]
    verdict: Label
    equality: Label | None = None
    speedup_pct: float | None = None


@dataclass(frozen=True)
class Table:
    """One scenario's rows. `text_columns` are set flush left, all others flush right."""

    title: str
    caption: str
    columns: tuple[str, ...]
    text_columns: frozenset[str]
    lines: tuple[Line, ...]


def is_ttft(rows: Sequence[Row]) -> bool:
    """Whether a scenario compares an arm with the direct one, or has nothing but failures."""
    done = [row for row in rows if row.status != "failed"]
    return not done or any(ttft_of(row) for row in done)


def _ttft_line(row: Row, extra_columns: Sequence[str], merged: bool) -> Line:
    figures, speedup = ttft_of(row), shown_speedup(row)
    times_s: list[float | None] = [None] * 3
    user_times_s: list[float | None] = [None] * 3
    queries = interval = None
    if figures:
        times_s = [figures.build_s, figures.kv_ttft_s, figures.direct_ttft_s]
        user_times_s = [figures.merge_s, figures.kv_user_ttft_s, figures.direct_user_ttft_s]
        queries, interval = figures.break_even_queries, figures.speedup_interval
    pays = formatting.NONE if queries is None or speedup is None else formatting.digits(queries)
    return Line(
        kind(row),
        (
            row.model,
            label(row, "context"),
            formatting.count(row.context_tokens),
            label(row, "query"),
            formatting.count(row.query_tokens),
            *(str(condition(row, name)) for name in extra_columns),
            *map(formatting.seconds, times_s),
            *(map(formatting.seconds, user_times_s) if merged else ()),
            formatting.percent(speedup),
            formatting.percent_range(interval if speedup is not None else None),
            str(equality(row)),
            str(verdict(row)),
            pays,
        ),
        verdict(row),
        equality(row),
        speedup,
    )


def _published_line(row: PublishedRow, extra_columns: Sequence[str], merged: bool) -> Line:
    known = {"hardware": row.hardware, "run": row.table}
    remark = f"({row.table}), hardware {row.hardware}"
    if row.build_s is not None and row.direct_ttft_s > MAX_DIRECT_RATIO * (row.build_s + row.kv_ttft_s):
        remark += (
            f"; its direct arm takes {formatting.times(row.direct_ttft_s / (row.build_s + row.kv_ttft_s))} build + KV"
        )
    return Line(
        "published",
        (
            row.model,
            row.context,
            formatting.count(row.context_tokens),
            row.query,
            formatting.count(row.query_tokens),
            *(known.get(name, formatting.NONE) for name in extra_columns),
            formatting.seconds(row.build_s),
            formatting.seconds(row.kv_ttft_s),
            formatting.seconds(row.direct_ttft_s),
            *(formatting.NONE for _ in _USER_COLUMNS if merged),
            formatting.percent(row.speedup_pct),
            formatting.NONE,
            formatting.NONE,
            f"published {remark}",
            formatting.NONE,
        ),
        Label("published", remark),
    )


def _ttft_table(title: str, rows: Sequence[Row]) -> Table:
    extra, merged = varying(rows), any(row.memories > 1 for row in rows)
    lines: list[Line] = []
    cells = [(row.model, label(row, "context"), label(row, "query")) for row in rows]
    for row, cell, following in zip(rows, cells, [*cells[1:], None], strict=True):
        lines.append(_ttft_line(row, extra, merged))
        if cell != following:  # below the last arm of a cell
            lines += [_published_line(other, extra, merged) for other in published.beside(*cell)]
    names = [_HEADINGS.get(name, name.capitalize()) for name in extra]
    interval = statistics.interval_name(row.rules for row in rows if row.status != "failed")
    columns = (
        *("Model", "Ctx", "CtxTok", "Qry", "QryTok", *names, *_ENGINE_COLUMNS, *(_USER_COLUMNS if merged else ())),
        *("Speedup", interval, "Equality", "Verdict", "Break even"),
    )
    return Table(title, caption(rows), columns, frozenset(_TEXT_COLUMNS | set(names)), tuple(lines))


def _columns(row: Row) -> dict[str, Any]:
    """The columns that a row's payload declares, by name."""
    payload = row.payload
    if payload is None:
        return {}
    if not payload.columns:
        return payload.figures()
    return {name: getattr(row if name in _ROW_FIELDS else payload, name) for name in payload.columns}


def _payload_table(title: str, rows: Sequence[Row]) -> Table:
    """The table of a scenario with figures of its own. A column in which no row has a figure is left out."""
    varied = varying(rows)
    values = [_columns(row) for row in rows]
    names = dict.fromkeys(name for figures in values for name in figures)
    shown = [name for name in names if any(figures.get(name) is not None for figures in values)]
    text = {formatting.heading(name) for name in shown if any(isinstance(figures.get(name), str) for figures in values)}
    headings = [_HEADINGS.get(name, name.capitalize()) for name in varied]
    lines = tuple(
        Line(
            kind(row),
            (
                row.model,
                *(str(condition(row, name)) for name in varied),
                *(formatting.by_name(name, figures.get(name)) for name in shown),
                str(verdict(row)),
            ),
            verdict(row),
        )
        for row, figures in zip(rows, values, strict=True)
    )
    columns = ("Model", *headings, *map(formatting.heading, shown), "Verdict")
    return Table(title, caption(rows), columns, frozenset({"Model", "Verdict", *headings} | text), lines)


def tables(rows: Sequence[Row]) -> list[Table]:
    """One table a scenario, in the order in which they were run."""
    scenarios: dict[str, list[Row]] = {}
    for row in rows:
        scenarios.setdefault(row.scenario, []).append(row)
    return [
        _ttft_table(name, group) if is_ttft(group) else _payload_table(name, group) for name, group in scenarios.items()
    ]


def markdown(rows: Sequence[Row]) -> str:
    """All tables and the summary as GitHub's Markdown."""
    out: list[str] = []
    for table in tables(rows):
        out += [f"### {_md(table.title)}", "", _md(table.caption), ""]
        out.append("| " + " | ".join(_md(name) for name in table.columns) + " |")
        out.append("|" + "|".join(" :-- " if name in table.text_columns else " --: " for name in table.columns) + "|")
        out += ["| " + " | ".join(_md(cell) for cell in line.cells) + " |" for line in table.lines]
        out.append("")
    return "\n".join([*out, summary(rows), ""])


def _md(text: str) -> str:
    """Text that stays one cell, and stays text."""
    for sign in ("\\", "|", "<", "*", "`", "[", "~", "&"):
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())


def compact(table: Table) -> Table:
    """Without the columns that tell nothing where room is short: one model, and labels that are the token counts."""
    cells = list(zip(*(line.cells for line in table.lines), strict=True))
    models = set(cells[0])
    repeats = {i for i, name in enumerate(table.columns) if name in ("Ctx", "Qry") and cells[i] == cells[i + 1]}
    drop = repeats | ({0} if len(models) == 1 else set())
    return dataclasses.replace(
        table,
        title=f"{table.title}: {models.pop()}" if 0 in drop else table.title,
        columns=tuple(name for i, name in enumerate(table.columns) if i not in drop),
        lines=tuple(
            dataclasses.replace(line, cells=tuple(cell for i, cell in enumerate(line.cells) if i not in drop))
            for line in table.lines
        ),
    )


_STYLE: dict[Kind, str] = {
    "ok": "",
    "invalid": "yellow",
    "undecided": "yellow",
    "failed": "red",
    "unjudged": "dim",
    "published": "dim italic",
}


def console_table(rows: Sequence[Row]) -> rich.console.RenderableType:
    """All tables and the summary for a terminal; the reasons of verdicts stand below, for they are long."""
    shown: list[rich.console.RenderableType] = []
    for table in map(compact, tables(rows)):
        grid = rich.table.Table(
            title=Text(table.title, "bold"),
            caption=Text(table.caption),
            title_justify="left",
            caption_justify="left",
            box=rich.box.SIMPLE_HEAD,
            padding=0,
            show_edge=False,
        )
        for name in table.columns:
            align: Literal["left", "right"] = "left" if name in table.text_columns else "right"
            grid.add_column(Text("\n".join(name.split())), justify=align, vertical="bottom")
        long = {name: table.columns.index(name) for name in ("Equality", "Verdict") if name in table.columns}
        reasons: list[Text] = []
        for line in table.lines:
            cells = list(line.cells)
            if line.verdict.detail:
                where = "/".join(cells[:2])
                reasons.append(Text(f"{line.verdict.name}: {where}: {line.verdict.detail}", _STYLE[line.kind]))
            cells[long["Verdict"]] = line.verdict.name
            if line.equality is not None:
                cells[long["Equality"]] = line.equality.name
            grid.add_row(*map(Text, cells), style=_STYLE[line.kind])
        shown += [grid, *reasons, Text("")]
    return rich.console.Group(*shown, Text(summary(rows)))
