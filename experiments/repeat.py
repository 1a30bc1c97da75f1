"""python -m experiments.repeat FOLDER: measures a run again in new processes, and tells the spread between runs.

The repeats lie in FOLDER/repeats/2, 3 and so on, and the table in FOLDER/between_runs.md. An interrupted repeat is
continued by the same command.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import signals
from experiments.config import compose
from experiments.execution import NOT_ALL_VALID, UNDECIDED, checkpoint
from experiments.hardware import layout
from experiments.reporting import between_runs, write_report
from experiments.results import SHARED_CONDITIONS, displayed_path, measured_rows, read_run
from kvmem.errors import ConfigError

REPORT = "report.html"
MEASURED = (0, NOT_ALL_VALID, UNDECIDED)
"""Exit statuses of a run that has measured all its cells, whatever their verdicts."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.repeat",
        description="Measures a finished run again, each time in a process of its own, and writes how far its figures "
        f"move between runs into {between_runs.FILE}.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a run's folder")
    least = between_runs.LEAST_RUNS
    parser.add_argument("--runs", type=int, default=least, help=f"how many runs in all, at least {least} (the default)")
    chosen = parser.parse_args(arguments)
    try:
        with signals.raised():
            print(repeat(chosen.folder, chosen.runs))
    except signals.Stopped as stopped:
        print(f"Interrupted ({stopped.name}). The same command continues.", file=sys.stderr)
        return stopped.exit_status
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def repeat(folder: Path, runs: int = between_runs.LEAST_RUNS) -> str:
    """Returns the table. runs: how many runs there are in the end, the folder's own among them.

    Raises ConfigError if the folder holds no finished run, if this machine, commit or version is not that of its rows,
    or if a repeat fails.
    """
    if runs < between_runs.LEAST_RUNS:
        raise ConfigError(f"--runs {runs} is below {between_runs.LEAST_RUNS}: two runs tell no spread.")
    _check_conditions(folder)
    given = _overrides(folder)
    for number in range(2, runs + 1):
        run_dir = (folder / between_runs.REPEATS / str(number)).resolve()
        if not checkpoint.is_finished(run_dir):
            print(f"run {number} of {runs}: {displayed_path(run_dir)}", flush=True)
            command = [sys.executable, "-m", "experiments.run", *given, "sink=none", f"hydra.run.dir={run_dir}"]
            status = subprocess.run(command, check=False).returncode
            if status not in MEASURED or not checkpoint.is_finished(run_dir):
                raise ConfigError(f"run {number} ended with status {status}. The same command continues it.")
    text = between_runs.markdown(folder)
    (folder / between_runs.FILE).write_text(text, encoding="utf-8")
    if (folder / REPORT).is_file():  # its page tells the spread too
        write_report(folder)
    return text


def _check_conditions(folder: Path) -> None:
    """Raises ConfigError where a repeat would not measure what the folder's run has measured."""
    rows = measured_rows(read_run(folder).rows)
    if not rows or ((folder / checkpoint.DONE).is_file() and not checkpoint.is_finished(folder)):
        raise ConfigError(f"{folder} holds no finished run. Repeat the run's own command to finish it.")
    here = layout.conditions()
    for name in SHARED_CONDITIONS:
        there = rows[0].conditions.get(name)
        if name != "vllm" and there != here.get(name):  # that engine's version is known when it is open
            raise ConfigError(
                f"{folder} was measured with {name}={there}, and here it is {here.get(name)}: runs of both tell "
                "nothing about the spread. Repeat it where it was measured, or measure it anew here."
            )


def _overrides(folder: Path) -> list[str]:
    """The run's own overrides, without those of sinks and folders. Raises ConfigError if they give another run now."""
    environment = json.loads(read_run(folder).environment or "{}")
    if "overrides" not in environment:
        raise ConfigError(f"{folder}/environment.json does not tell the run's overrides, so it can't be repeated.")
    given = [text for text in environment["overrides"] if not text.lstrip("+~").startswith(("sink", "hydra."))]
    if checkpoint.config_hash(compose.resolved(compose.compose(given))) != checkpoint.hash_of_run(folder):
        raise ConfigError(
            f"The overrides of {folder}/environment.json don't give its config.yaml: a default has changed since, or "
            "the file was edited. Measure the folder anew."
        )
    return given


if __name__ == "__main__":
    sys.exit(main())
