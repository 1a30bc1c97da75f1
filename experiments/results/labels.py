"""What a row is called, word for word the same in tables, plots and report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from experiments.results import formatting
from experiments.results.row import Row
from experiments.results.ttft import ttft_of

Kind = Literal["ok", "invalid", "undecided", "failed", "unjudged", "published"]
GRADES = {
    "bitwise": "bitwise",
    "tokens": "tokens",
    "near_tie": "near-tie",
    "drifted": "drifted",
    "diverged": "diverged",
}


LEFT_OUT = "left out"
PREDICTED = "predicted"
"""The engine of rows that are computed from a model of the hardware. No verdict applies to them."""


@dataclass(frozen=True)
class Label:
    """A short name, and the detail that is shown where there is room for it."""

    name: str
    detail: str = ""
    style: Literal["colon", "parentheses"] = "colon"

    def __str__(self) -> str:
        if not self.detail:
            return self.name
        return f"{self.name}: {self.detail}" if self.style == "colon" else f"{self.name} ({self.detail})"


CONDITIONS = ("weights", "dtype", "backend", "attention", "hardware", "merge", "tier", "arm", "memories")


def label(row: Row, side: Literal["context", "query"]) -> str:
    """The published name of a cell's side ("long"), or its token count."""
    if side == "context":
        return row.context_label or formatting.count(row.context_tokens)
    return row.query_label or formatting.count(row.query_tokens)


def kind(row: Row) -> Kind:
    """How a row is counted and coloured."""
    if row.status == "failed":
        return "failed"
    match row.verdict:
        case "ok" | "invalid" | "undecided":
            return row.verdict
        case _:
            return "unjudged"


def is_prediction(row: Row) -> bool:
    return row.backend == PREDICTED


def shown_speedup(row: Row) -> float | None:
    """The speed-up in %, if it was measured and the verdict is ok."""
    figures = ttft_of(row)
    return figures.speedup_pct if figures and kind(row) == "ok" else None


def last_line(error: str) -> str:
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason was recorded"


def verdict(row: Row) -> Label:
    """ok (with a remark), "invalid: reason", or "failed: the last line of the error"."""
    match kind(row):
        case "failed":
            return Label("failed", last_line(row.error))
        case "invalid":
            return Label("invalid", row.verdict_reason or "no reason was recorded")
        case "undecided":
            return Label("undecided", row.verdict_reason)
        case "unjudged":
            if row.payload is not None and not row.payload.is_measured:
                return Label(LEFT_OUT, row.verdict_reason)
            return Label(PREDICTED if is_prediction(row) else "not judged")
        case other:
            return Label(other, row.verdict_reason)


def equality(row: Row) -> Label:
    """The grade, with the margin of a near tie and the position of the first difference."""
    if row.equality is None:
        return Label(formatting.NONE)
    notes = []
    if row.equality in ("near_tie", "diverged") and row.first_difference is not None:
        notes.append(f"at token {row.first_difference}")
    if row.equality == "near_tie" and row.near_tie_margin is not None:
        notes.append(f"margin {formatting.digits(row.near_tie_margin)}")
    return Label(GRADES.get(row.equality, row.equality), ", ".join(notes), "parentheses")


def condition(row: Row, name: str) -> Any:
    """A field of `CONDITIONS`, or "run", which joining runs adds to a row's conditions."""
    return row.conditions.get("run") if name == "run" else getattr(row, name)


def varying(rows: Sequence[Row]) -> list[str]:
    """The conditions that are not the same in all rows; each becomes a column, the others go into the caption."""
    return [name for name in ("run", *CONDITIONS) if len({str(condition(row, name)) for row in rows}) > 1]


def caption(rows: Sequence[Row]) -> str:
    """What all rows share, in a line."""
    shared = [name for name in CONDITIONS if name not in varying(rows) and name not in ("arm", "memories")]
    parts = [f"{name} {condition(rows[0], name)}" for name in shared if condition(rows[0], name)]
    pairs = sorted({row.pairs for row in rows if row.pairs})
    if pairs:
        parts.append(
            f"{formatting.count(pairs[0])}{f' to {formatting.count(pairs[-1])}' if len(pairs) > 1 else ''} pairs a cell"
        )
    if any((figures := ttft_of(row)) and figures.break_even_queries is not None for row in rows):
        parts.append("break even in queries")
    if rows[0].memories > 1 and "memories" not in varying(rows):
        parts.append(f"{rows[0].memories} memories a cell")
    return " · ".join(parts)


def summary(rows: Sequence[Row]) -> str:
    """How many rows, their verdicts and their equality grades, in a line."""
    kinds = Counter(kind(row) for row in rows)
    if rows and all(map(is_prediction, rows)) and not kinds["failed"]:
        return f"{formatting.plural(len(rows), 'row')}, predicted. Nothing was measured."
    verdicts = [f"{kinds['ok']} ok", f"{kinds['invalid']} invalid", f"{kinds['failed']} failed"]
    if kinds["undecided"]:
        verdicts.insert(2, f"{kinds['undecided']} undecided")
    if kinds["unjudged"]:
        verdicts.append(f"{kinds['unjudged']} not judged")
    line = f"{formatting.plural(len(rows), 'row')}: {', '.join(verdicts)}."
    grades = Counter(row.equality for row in rows if row.equality is not None)
    if grades:
        shown = [f"{grades[grade]} {name}" for grade, name in GRADES.items() if grades[grade] or grade != "drifted"]
        line += f" Equality: {', '.join(shown)}."
    return line
