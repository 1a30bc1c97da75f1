"""Ctrl-C and SIGTERM: one line says how to go on, no process is left behind, and no row is lost."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.execution import UNDECIDED, checkpoint
from experiments.results import read_rows
from kvmem.errors import ConfigError
from tests.faults.commands import (
    ENV,
    ONE_CELL,
    THREE_CELLS,
    TINY,
    alive,
    ctrl_c,
    descendants,
    finish,
    interruptible,
    read_to,
    run,
    start,
)
from tests.helpers.rows import ttft_row

BEFORE_IMPORTS = """
import os, signal, sys

class Interrupts:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
from experiments import run
sys.exit(run.main())
"""

WHERE_PYTHON_DROPS_EXCEPTIONS = """
import os, signal, time
from experiments import signals

class Interrupts:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

try:
    with signals.raised():
        Interrupts()
        print("dropped", flush=True)
        time.sleep(60)
        print("lost")
except signals.Stopped as stopped:
    print(stopped.name, stopped.exit_status)
"""


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | ENV,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=interruptible,
    )


def test_ctrl_c_in_a_run_is_one_line_whose_command_goes_on(tmp_path: Path) -> None:
    command = start(tmp_path, *TINY, THREE_CELLS, "scenario.pairs=40")
    read_to(command, "[2/3]")
    ctrl_c(command)
    status, output = finish(command)
    assert status == 130, output
    # The second cell may have ended before the signal came.
    said = [line for line in output.splitlines() if not re.match(r"\[\d/3\] |\d+/32: ", line)]
    assert len(said) == 1, output
    line = said[0]
    assert re.match(r"Interrupted \(Ctrl-C\) after \d finished cells?\. To go on: python -m experiments\.run ", line)
    (folder,) = tmp_path.glob("outputs/*/*")
    kept = read_rows(folder)
    assert 1 <= len(kept) < 3

    again = shlex.split(line.partition("To go on: python -m experiments.run ")[2])
    status, output = run(tmp_path, *again)
    assert status in (0, UNDECIDED), output
    assert f"{len(kept)} of 3 cells are already finished" in output
    rows = read_rows(folder)
    assert rows[: len(kept)] == kept and [row.context_tokens for row in rows] == [64, 96, 128]


def test_ctrl_c_while_everything_is_still_imported_is_one_line(tmp_path: Path) -> None:
    done = python(BEFORE_IMPORTS, tmp_path)
    assert done.returncode == 130
    assert done.stderr.splitlines() == ["Interrupted (Ctrl-C) before anything was measured."]
    assert list(tmp_path.iterdir()) == []


def test_a_signal_where_python_drops_exceptions_is_not_lost(tmp_path: Path) -> None:
    done = python(WHERE_PYTHON_DROPS_EXCEPTIONS, tmp_path)
    assert done.stdout.splitlines() == ["dropped", "Ctrl-C 130"] and done.stderr == ""


@pytest.mark.parametrize("how", ["SIGTERM", "Ctrl-C", "SIGKILL"])
def test_a_sweep_that_is_ended_leaves_no_process_and_no_folder_in_use(tmp_path: Path, how: str) -> None:
    sweep = ("-m", *TINY, ONE_CELL, "scenario.pairs=300", "seed=0,1", "launcher=joblib", "hydra.sweep.dir=sweep")
    command = start(tmp_path, *sweep)
    while not all((tmp_path / f"sweep/{job}/config.yaml").is_file() for job in range(2)):
        assert command.poll() is None, finish(command)
        time.sleep(0.05)
    workers = descendants(command)
    if how == "Ctrl-C":
        ctrl_c(command)
    else:
        command.send_signal(signal.Signals[how])
    status, output = finish(command)
    assert len(workers) >= 2 and alive(workers) == []
    for job in range(2):
        with (
            pytest.raises(ConfigError, match="holds rows of another configuration"),  # and not: is being written
            checkpoint.opened(tmp_path / f"sweep/{job}", {}),
        ):
            pass
    if how == "SIGKILL":  # which leaves no time to say anything
        assert status == -signal.SIGKILL
        return
    assert status == (143 if how == "SIGTERM" else 130)
    last = output.splitlines()[-1]
    assert last == f"Interrupted ({how}) after 0 finished jobs, in sweep. The same command goes on with the others."
    assert "Traceback" not in output


def test_a_killed_worker_of_a_sweep_is_one_line(tmp_path: Path) -> None:
    sweep = ("-m", *TINY, ONE_CELL, "scenario.pairs=300", "seed=0,1", "launcher=joblib", "hydra.sweep.dir=sweep")
    command = start(tmp_path, *sweep)
    writer = tmp_path / "sweep/1/WRITER"
    while not (writer.is_file() and writer.read_text()):
        assert command.poll() is None, finish(command)
        time.sleep(0.05)
    workers = descendants(command)
    os.kill(int(writer.read_text().split()[1]), signal.SIGKILL)
    status, output = finish(command)
    assert status == 1 and "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: A process of the sweep was killed ({SIGKILL(-9)")
    assert alive(workers) == []


def test_sigterm_ends_the_ranks_of_a_run(tmp_path: Path) -> None:
    two = ("backend=hf_ranks", "model.shape=tiny_wide", "hardware.tensor_parallel=2", "hydra.run.dir=run")
    command = start(tmp_path, *TINY, *two, THREE_CELLS, "scenario.pairs=12", CUDA_VISIBLE_DEVICES="")
    read_to(command, "[2/3]")
    ranks = descendants(command)
    command.send_signal(signal.SIGTERM)
    status, output = finish(command)
    assert status == 143
    assert re.match(r"Interrupted \(SIGTERM\) after \d finished cells?\. To go on: ", output.splitlines()[-1])
    assert "Traceback" not in output
    assert len(ranks) >= 3 and alive(ranks) == []
    assert read_rows(tmp_path / "run")[0].context_tokens == 64


def test_a_folder_that_another_process_writes_is_no_wrong_command(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with checkpoint.opened(folder, {}):
        status, output = run(tmp_path, *TINY, ONE_CELL, "hydra.run.dir=run")
    assert status == 1
    assert output.splitlines() == [
        f"error: run is being written by process {os.getpid()} on {os.uname().nodename}. Wait for it, end it, or "
        "choose another folder."
    ]


def test_ctrl_c_in_a_report_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/rows.jsonl").write_text(f"{ttft_row().to_json()}\n")
    interrupts = BEFORE_IMPORTS.replace('"torch"', '"experiments.sinks.wandb"').partition(
        "from experiments import run"
    )[0]
    code = interrupts + "from experiments import report; sys.exit(report.main(['run', '--log']))"
    done = python(code, tmp_path)
    assert done.returncode == 130
    assert done.stderr.splitlines() == ["Interrupted (Ctrl-C). The same command writes the report again."]
