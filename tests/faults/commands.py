"""`python -m experiments.run` as a user starts it, on a tiny model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from experiments.config.compose import CONF
from tests.helpers import warm_python

TINY = ("model=tiny", "sink=none", "workload.query_tokens=[32]", "scenario.pairs=2", "scenario.answer_tokens=2")
ONE_CELL = "workload.context_tokens=[64]"
THREE_CELLS = "workload.context_tokens=[64,96,128]"
ENV = {"PYTHONPATH": str(CONF.parent), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(folder: Path, *overrides: str, **env: str) -> subprocess.Popen[str]:
    """The command, running in `folder` as the leader of a process group of its own. Its stderr goes to its stdout."""
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.run", *overrides],
        cwd=folder,
        env=os.environ | ENV | env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=interruptible,
    )


def interruptible() -> None:
    """Undoes what a shell does to commands in the background: a process inherits that it ignores Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(folder: Path, *overrides: str, **env: str) -> tuple[int, str]:
    """Exit status and output of the whole command. It is a new interpreter where it logs to W&B, or has an environment
    of its own."""
    if not env and "sink=wandb" not in overrides:
        done = warm_python.run(folder, *overrides, env=ENV, joined=True)
        return done.returncode, done.stdout
    with start(folder, *overrides, **env) as command:
        return finish(command)


def finish(command: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and the rest of the output."""
    assert command.stdout is not None
    output = command.stdout.read()
    return command.wait(), output


def read_to(command: subprocess.Popen[str], start_of_line: str) -> None:
    """Reads the output up to a line."""
    assert command.stdout is not None
    seen = []
    for line in command.stdout:
        seen.append(line)
        if line.startswith(start_of_line):
            return
    raise AssertionError(f"no line begins with {start_of_line!r}: {''.join(seen)}")


def descendants(command: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(command.pid).children(recursive=True)


def alive(processes: list[psutil.Process]) -> list[str]:
    """The command lines of those that still run, once those that are ending have had time to."""
    return [" ".join(process.cmdline()) for process in psutil.wait_procs(processes, timeout=10)[1]]


def ctrl_c(command: subprocess.Popen[str]) -> None:
    """A terminal sends SIGINT to the whole process group."""
    os.killpg(command.pid, signal.SIGINT)
