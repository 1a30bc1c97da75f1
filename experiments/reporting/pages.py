"""Writes the table, the plots and the HTML page of one run, or of several runs joined, from their rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from experiments.reporting import between_runs, html, plots, tables
from experiments.results import Row, Run, read_run


def write_report(run_dir: Path) -> Path:
    """Writes table.md, plots/ and report.html into a run's folder; returns the page's path. Where the run was repeated,
    the page tells the spread between runs."""
    return _write([read_run(run_dir)], run_dir, between_runs.spread_of(run_dir))


def write_joined(run_dirs: Sequence[Path], out: Path) -> Path:
    """One report of several runs in `out`, which is made; each row says which run it is of."""
    folders = list(dict.fromkeys(path.resolve() for path in run_dirs))
    # As many names of each path as tell them apart: two machines' copies of a sweep end alike.
    depth = next(depth for depth in count(2) if len({folder.parts[-depth:] for folder in folders}) == len(folders))
    runs = [dataclasses.replace(read_run(folder), name="/".join(folder.parts[-depth:])) for folder in folders]
    return _write(runs, out)


def _write(runs: Sequence[Run], out: Path, spread: between_runs.Spread | None = None) -> Path:
    rows = [_of_run(row, run.name) if len(runs) > 1 else row for run in runs for row in run.rows]
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(tables.markdown(rows), encoding="utf-8")
    plots.write_plots(rows, out / "plots")
    path = out / "report.html"
    path.write_text(html.render(rows, runs, spread), encoding="utf-8")
    return path


def _of_run(row: Row, name: str) -> Row:
    return dataclasses.replace(row, conditions=row.conditions | {"run": name})
