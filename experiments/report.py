"""python -m experiments.report RUN [RUN...]: the table, the plots and the page of a run, or of several joined.

Everything is made from rows.jsonl again, so that a killed run has its report too.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments import page, plots, tables
from experiments.row import Row
from kvmem.errors import ConfigError

JOINED = Path("outputs/joined")


@dataclass(frozen=True)
class Run:
    """What a run left in its folder. `config` and `environment` are texts, empty where the file is missing."""

    name: str
    rows: tuple[Row, ...]
    unread_lines: int
    config: str
    environment: str


def read_run(run_dir: Path) -> Run:
    """Reads a run's folder; ConfigError where it is none. A line that a kill cut short is left out and counted."""
    path = run_dir / "rows.jsonl"
    if not path.is_file():
        raise ConfigError(f"{run_dir} is no run: it has no rows.jsonl. Runs lie in outputs/<date>/<time>/.")
    rows, unread_lines = [], 0
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            rows.append(Row.from_json(line.decode()))
        except ValueError:
            unread_lines += 1
        except TypeError as error:  # whole JSON, and other fields than a row's
            raise ConfigError(f"{path}, line {number}, was written by another version of kvmem: {error}") from error
    texts = [run_dir / name for name in ("config.yaml", "environment.json")]
    config, environment = (text.read_text(encoding="utf-8") if text.is_file() else "" for text in texts)
    return Run("/".join(run_dir.resolve().parts[-2:]), tuple(rows), unread_lines, config, environment)


def write_report(run_dir: Path) -> Path:
    """Writes table.md, plots/ and report.html into a run's folder; returns the page's path."""
    return _write([read_run(run_dir)], run_dir)


def write_joined(run_dirs: Sequence[Path], out: Path) -> Path:
    """One report of several runs in `out`, which is made; each row says which run it is of."""
    runs = [read_run(run_dir) for run_dir in dict.fromkeys(path.resolve() for path in run_dirs)]
    return _write(runs, out)


def _write(runs: Sequence[Run], out: Path) -> Path:
    rows = [_of_run(row, run.name) if len(runs) > 1 else row for run in runs for row in run.rows]
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(tables.markdown(rows), encoding="utf-8")
    plots.write_plots(rows, out / "plots")
    path = out / "report.html"
    path.write_text(page.render(rows, runs), encoding="utf-8")
    return path


def _of_run(row: Row, name: str) -> Row:
    return dataclasses.replace(row, conditions=row.conditions | {"run": name})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description="Writes table.md, plots/ and report.html of a run, or of several runs joined.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, outputs/<date>/<time>")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"default: the run's folder, or {JOINED}")
    parser.add_argument("--log", action="store_true", help="send the rows to W&B (offline unless WANDB_MODE says so)")
    chosen = parser.parse_args(arguments)
    try:
        out = chosen.out or (JOINED if len(chosen.runs) > 1 else None)
        print(write_report(chosen.runs[0]) if out is None else write_joined(chosen.runs, out))
        if chosen.log:
            from experiments.sinks.wandb import log_run  # not needed, nor imported, without --log

            for run_dir in chosen.runs:
                if line := log_run(run_dir):
                    print(line)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
