"""A 2×2 sweep as a user starts it, for the launchers' tests."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.config.compose import CONF
from experiments.execution import NOT_ALL_VALID, UNDECIDED
from experiments.results.row import Row
from experiments.results.run_dir import read_rows

QUERIES = [16, 24, 32, 40]
COMMAND = (
    "hardware.host_memory_gb=4,0.8",
    "workload.context_tokens=[64]",
    f"workload.query_tokens={QUERIES}".replace(" ", ""),
    "scenario.pairs=1",
    "scenario.answer_tokens=2",
    "sink=none",
)
"""Two amounts of host memory. The test names two models, which vary more slowly."""


def status_of(rows: Sequence[Row]) -> int:
    """The exit status of a sweep that finished with these rows."""
    if any(row.verdict == "invalid" or row.equality == "diverged" for row in rows):
        return NOT_ALL_VALID
    return UNDECIDED if any(row.verdict == "undecided" for row in rows) else 0


def start(folder: Path, env: dict[str, str], *more: str) -> subprocess.Popen[str]:
    """The sweep's command with `more`, running in `folder`; stdout and stderr are joined."""
    env = os.environ | env | {"PYTHONPATH": str(CONF.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.run", "-m", *more, *COMMAND],
        cwd=folder,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def sweep_folder(folder: Path) -> Path | None:
    """The one sweep that was started in `folder`; None if it has not begun."""
    found = list(folder.glob("outputs/sweeps/kv_vs_direct-*"))
    assert len(found) <= 1, "the same command makes one folder"
    return found[0] if found else None


def rows_text(run_dir: Path) -> str:
    """Whole lines of rows.jsonl as they are now."""
    path = run_dir / "rows.jsonl"
    text = path.read_text() if path.is_file() else ""
    return text[: text.rfind("\n") + 1]


def writer(run_dir: Path) -> int | None:
    """The process that writes, or last wrote, a run's folder."""
    path = run_dir / "WRITER"
    process = re.search(r"process (\d+)", path.read_text()) if path.is_file() else None
    return int(process[1]) if process else None


def jobs_in(output: str) -> dict[int, str]:
    """The cluster's job name for each index in the sweep, read from a command's output."""
    return {int(index): job for job, index in re.findall(r"^job (\w+): #(\d+)", output, re.M)}


def kill(process: int | None) -> None:
    assert process is not None
    os.kill(process, signal.SIGKILL)


def finished(run_dir: Path) -> bool:
    return bool(json.loads((run_dir / "DONE.json").read_text())["finished"])


def is_whole(sweep: Path) -> list[Row]:
    """Returns the rows. Checks that each cell of each job has one measured row, and the joined table has all."""
    rows = [row for job in range(4) for row in read_rows(sweep / str(job))]
    assert [row.query_tokens for row in rows] == QUERIES * 4
    assert {row.status for row in rows} == {"done"}
    assert f"{len(rows)} rows" in (sweep / "table.md").read_text()
    return rows
