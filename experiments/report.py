"""python -m experiments.report RUN [RUN...]: writes the table, the plots and the page of one or several runs.

Everything is computed from rows.jsonl, so a killed run has a report too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import signals
from experiments.reporting import write_joined, write_report
from experiments.results import read_run, runs_in
from kvmem.errors import ConfigError

JOINED = Path("outputs/joined")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description="Writes table.md, plots/ and report.html for a run, or for several runs together.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a sweep's")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"default: the run's folder, or {JOINED}")
    parser.add_argument("--log", action="store_true", help="send the rows to W&B (offline unless WANDB_MODE says so)")
    chosen = parser.parse_args(arguments)
    try:
        with signals.raised():
            return _report(chosen)
    except signals.Stopped as stopped:
        print(f"Interrupted ({stopped.name}). The same command writes the report again.", file=sys.stderr)
        return stopped.exit_status


def _report(chosen: argparse.Namespace) -> int:
    try:
        runs = [run for folder in chosen.runs for run in runs_in(folder) or [folder]]
        out = chosen.out or (JOINED if len(chosen.runs) > 1 else chosen.runs[0])
        if empty := [run for run in runs if not read_run(run).rows]:
            raise ConfigError(
                f"{', '.join(map(str, empty))}: rows.jsonl holds no complete row. The run ended before its first cell, "
                "or the file is truncated. Repeat the run's command to continue it."
            )
        print(write_report(out) if runs == [out] else write_joined(runs, out))
        if chosen.log:
            from experiments.sinks import log_run  # only --log needs it

            for run_dir in runs:
                if line := log_run(run_dir):
                    print(line)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
