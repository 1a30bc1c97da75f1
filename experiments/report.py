"""python -m experiments.report RUN [RUN...]: the table, the plots and the page of a run, or of several joined.

Everything is made from rows.jsonl again, so that a killed run has its report too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.reporting import write_joined, write_report
from experiments.results import read_run, runs_in
from kvmem.errors import ConfigError

JOINED = Path("outputs/joined")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description="Writes table.md, plots/ and report.html of a run, or of several runs joined.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a sweep's")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"default: the run's folder, or {JOINED}")
    parser.add_argument("--log", action="store_true", help="send the rows to W&B (offline unless WANDB_MODE says so)")
    chosen = parser.parse_args(arguments)
    try:
        runs = [run for folder in chosen.runs for run in runs_in(folder) or [folder]]
        out = chosen.out or (JOINED if len(chosen.runs) > 1 else chosen.runs[0])
        if empty := [run for run in runs if not read_run(run).rows]:
            raise ConfigError(
                f"{', '.join(map(str, empty))}: rows.jsonl holds no whole row. The run ended before its first cell, "
                "or the file was cut off. The run's own command goes on with it."
            )
        print(write_report(out) if runs == [out] else write_joined(runs, out))
        if chosen.log:
            from experiments.sinks import log_run  # not needed, nor imported, without --log

            for run_dir in runs:
                if line := log_run(run_dir):
                    print(line)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
