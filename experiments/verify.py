"""python -m experiments.verify FOLDER...: computes every printed figure again from the samples that a run stores.

The exit status is 0 if everything agrees, 1 if something differs, 2 if a folder holds no run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import signals
from experiments.audit import audit, measure_anew
from experiments.reporting import between_runs
from experiments.results import displayed_path, formatting, runs_in
from kvmem.errors import KVMemError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.verify",
        description="Computes verdicts, medians, speed-ups, intervals and break-evens again from the samples in "
        "rows.jsonl, and compares them with the rows, table.md, report.html and offline W&B files of the folder.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a run's folder, or a folder of runs")
    parser.add_argument(
        "--rerun",
        nargs="?",
        const="",
        metavar="CELL",
        help="measure this cell anew on this machine (such as 256/32; default: the smallest), and compare intervals",
    )
    chosen = parser.parse_args(arguments)
    try:
        with signals.raised():
            return _verify(chosen.folders, chosen.rerun)
    except signals.Stopped as stopped:
        print(f"Interrupted ({stopped.name}). Nothing was written.", file=sys.stderr)
        return stopped.exit_status
    except (KVMemError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _verify(folders: Sequence[Path], rerun: str | None) -> int:
    runs = [run for folder in folders for run in runs_in(folder) or [folder]]
    repeats = [repeat for run in runs for repeat in between_runs.repeats_of(run)]
    differ = 0
    for run in runs + repeats:
        checked = audit(run)
        anew = [] if rerun is None or run in repeats else measure_anew(run, rerun or None)
        findings = [*checked.findings, *anew]
        print(displayed_path(run))
        for finding in findings:
            print(f"  {finding}")
        print(f"  {checked.summary}")
        differ += any(finding.differs for finding in findings)
    print(
        f"{formatting.plural(len(runs + repeats), 'folder')}: "
        + (f"{differ} with differences" if differ else "everything agrees with the stored samples")
    )
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
