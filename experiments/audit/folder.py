"""A run's folder: every row, and whether table, page, W&B's files, commits and configuration agree with the rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.audit.figures import check_row, checked_as, name_of, same
from experiments.audit.finding import Finding
from experiments.execution import checkpoint
from experiments.reporting import between_runs, html, tables
from experiments.results import (
    SHARED_CONDITIONS,
    Row,
    Run,
    different_conditions,
    formatting,
    judged_figures,
    measured_rows,
    read_run,
)
from experiments.sinks import as_logged, logged_rows

SHARED_FIELDS = ("model", "weights", "dtype", "backend", "attention", "hardware")
OLDER = "measured by the rules before: only what is stored can be checked"
WRITE_AGAIN = "python -m experiments.report writes it again"
LONGEST = 160


@dataclass(frozen=True)
class Audit:
    """What was found in one folder, and in a line what was checked."""

    folder: Path
    findings: tuple[Finding, ...]
    summary: str

    @property
    def agrees(self) -> bool:
        return not any(finding.differs for finding in self.findings)


def audit(folder: Path) -> Audit:
    """Checks a run's folder. Raises ConfigError if it is none."""
    run = read_run(folder)
    findings = [finding for row in run.rows for finding in check_row(row)]
    findings += [*_lines(run), *_provenance(folder, run.rows)]
    files = []
    for name, check in (("table.md", _table), ("report.html", _page), (between_runs.FILE, _between_runs)):
        if (folder / name).is_file():
            findings += check(folder / name, run)
            files.append(name)
    if (logged := logged_rows(folder)) is not None:
        path, table = logged
        findings += _logged(path.name, table, run.rows)
        files.append("W&B's table of rows")
    counts = Counter(map(checked_as, run.rows))
    parts = [f"{count} {what}" for what, count in counts.items()]
    compared = f"; compared with {', '.join(files)}" if files else ""
    return Audit(folder, tuple(findings), f"{formatting.plural(len(run.rows), 'row')}: {', '.join(parts)}{compared}")


def _lines(run: Run) -> Iterator[Finding]:
    for row in run.rows:
        if verdicts := row.conditions.get("earlier_verdicts"):
            text = f"the cell was measured {len(verdicts) + 1} times; before it was {', then '.join(verdicts)}"
            yield Finding(name_of(row), text, differs=False)
    if not run.rows:
        yield Finding("rows.jsonl", "it holds no row")
    if run.unread_lines:
        yield Finding("rows.jsonl", f"{formatting.plural(run.unread_lines, 'line')} could not be read")
    older = [row for row in run.rows if checked_as(row) == "checked by what is stored"]
    if older:
        judged = len(older) < len([row for row in run.rows if row.status != "failed"])
        scenarios = ", ".join(dict.fromkeys(row.scenario for row in older)) if judged else "all rows"
        yield Finding("rows.jsonl", f"{scenarios}: {OLDER}", differs=False)


def _provenance(folder: Path, rows: Sequence[Row]) -> Iterator[Finding]:
    """Whether all rows are of one commit and one configuration; a remark only if no row is of the present rules."""
    differs = any(checked_as(row) == "judged again" for row in rows)
    measured = measured_rows(rows)
    if measured and not any(row.conditions.get("commit") for row in measured):
        yield Finding("rows.jsonl", "no row says which commit measured it", differs=False)
    for name in (*SHARED_FIELDS, *SHARED_CONDITIONS):
        of_row = [str(getattr(row, name) if name in SHARED_FIELDS else row.conditions.get(name)) for row in measured]
        if len(values := Counter(of_row)) > 1:
            first_of = {value: name_of(measured[of_row.index(value)]) for value in values}
            told = ", ".join(f"{value} in {count} (first: {first_of[value]})" for value, count in values.items())
            yield Finding("rows.jsonl", f"the rows have different values of {name}: {told}", differs)
    if dirty := {commit for row in measured if (commit := str(row.conditions.get("commit"))).endswith("+")}:
        told = ", ".join(sorted(dirty))
        yield Finding("rows.jsonl", f"the code differed from its commit when it ran ({told})", differs=False)
    recorded, hashed = checkpoint.recorded_hash(folder), checkpoint.hash_of_run(folder)
    if recorded == checkpoint.hash_of_run(folder, numbers_as_written=True):
        hashed = recorded
    if recorded is not None and hashed is not None and recorded != hashed:
        text = f"config.yaml has the hash {hashed}, and the rows were measured with {recorded} by DONE.json"
        yield Finding("config.yaml", text, differs)


def _table(path: Path, run: Run) -> list[Finding]:
    return _first_difference(path, path.read_text(encoding="utf-8"), tables.markdown(run.rows))


def _between_runs(path: Path, run: Run) -> list[Finding]:
    folder = path.parent
    repeats = between_runs.repeats_of(folder)
    found = []
    for repeat in repeats:
        rows = read_run(repeat).rows
        if checkpoint.hash_of_run(repeat) != checkpoint.hash_of_run(folder):
            found.append(Finding(path.name, f"repeat {repeat.name} has another configuration than the run"))
        for name, values in different_conditions([*run.rows, *rows]).items():
            told = " and ".join(values)
            found.append(
                Finding(path.name, f"the run and repeat {repeat.name} have different values of {name}: {told}")
            )
    samples = [
        {tuple(figures.kv_ttft_all_s) for row in read_run(one).rows if (figures := judged_figures(row)) is not None}
        for one in (folder, *repeats)
    ]
    if len(set().union(*samples)) < sum(map(len, samples)):
        found.append(Finding(path.name, "two runs have the same samples: one was copied, and not measured"))
    return found + _first_difference(path, path.read_text(encoding="utf-8"), between_runs.markdown(folder))


def _page(path: Path, run: Run) -> list[Finding]:
    """Compares the page's text. Its plots are pictures, and its heading names the folder, which may have moved."""
    stored, again = (
        re.sub(r"data:image/[^\"')]*|<p class=\"eyebrow\">.*", "", text)
        for text in (
            path.read_text(encoding="utf-8"),
            html.render(run.rows, [run], between_runs.spread_of(path.parent)),
        )
    )
    return _first_difference(path, stored, again)


def _first_difference(path: Path, stored: str, again: str) -> list[Finding]:
    old, new = stored.splitlines(), again.splitlines()
    length = max(len(old), len(new))
    pairs = zip(old + [""] * (length - len(old)), new + [""] * (length - len(new)), strict=True)
    lines = [(number, a, b) for number, (a, b) in enumerate(pairs, 1) if a != b]
    if not lines:
        return []
    number, a, b = lines[0]
    cut = max(0, next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0) - LONGEST // 2)
    was, gives = (repr(line[cut : cut + LONGEST].strip()) for line in (a, b))
    more = f"; {len(lines) - 1} more differ" if len(lines) > 1 else ""
    return [Finding(path.name, f"line {number} says {was}, and the rows give {gives}{more}. {WRITE_AGAIN}")]


def _logged(name: str, table: Sequence[dict[str, Any]], rows: Sequence[Row]) -> Iterator[Finding]:
    """What W&B was sent, beside the rows."""
    if len(table) != len(rows):
        yield Finding(name, f"W&B's table has {len(table)} rows, and rows.jsonl has {len(rows)}")
        return
    for logged, row in zip(table, rows, strict=True):
        of_row = as_logged(row)
        for column, value in logged.items():
            if not _equal(value, of_row.get(column)):
                stored = str(of_row.get(column))[:LONGEST]
                yield Finding(
                    name, f"{name_of(row)}: W&B has {column} = {str(value)[:LONGEST]}, and the row has {stored}"
                )


def _equal(a: Any, b: Any) -> bool:
    numbers = all(isinstance(value, (int, float)) for value in (a, b))
    return same(float(a), float(b)) if numbers else bool(a == b)
