"""`python -m experiments.run` in a fork of an interpreter that has imported what every run imports.

The imports take several seconds, and are the same for each command. An interpreter is started once for each
environment, imports them, and forks for each command. A fork sets its arguments, folder, stdin, stdout and stderr, and
runs the module as `__main__` does; it ends as an interpreter ends. What a test says about signals, about the imports
themselves, or about W&B, whose tables are incomplete in a fork, needs a new interpreter.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

SERVER = """
import json, os, runpy, sys
import experiments.execution.command
threads = os.listdir("/proc/self/task")
assert len(threads) == 1, f"a fork has no threads, and this process has {len(threads)}"
answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
else:
    sys.exit()
answers.close()
for number, (path, flags) in enumerate([
    (os.devnull, os.O_RDONLY),
    (order["stdout"], os.O_WRONLY | os.O_APPEND),
    (order["stderr"], os.O_WRONLY | os.O_APPEND),
]):
    opened = os.open(path, flags)
    os.dup2(opened, number)
    os.close(opened)
sys.stdin = os.fdopen(os.dup(0))
os.chdir(order["folder"])
sys.path[0] = order["folder"]
sys.argv[1:] = order["arguments"]
runpy.run_module("experiments.run", run_name="__main__", alter_sys=True)
"""


class WarmPython:
    """An interpreter with one environment, and the commands that it runs."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        atexit.register(self.close)

    def run(self, folder: Path, *arguments: str, joined: bool = False) -> subprocess.CompletedProcess[str]:
        """Runs the command in `folder`. If `joined`, stdout has both streams, as written."""
        with tempfile.TemporaryDirectory(prefix="command-") as outputs:
            stdout, stderr = (Path(outputs) / name for name in ("stdout", "stderr"))
            for path in (stdout, stderr):
                path.touch()
            order = {"folder": str(folder), "arguments": arguments, "stdout": str(stdout)}
            order["stderr"] = str(stdout if joined else stderr)
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            status = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(arguments, status, stdout.read_text(), stderr.read_text())

    def close(self) -> None:
        """Ends the interpreter. A command that runs ends first."""
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()


def run(
    folder: Path, *arguments: str, env: Mapping[str, str], joined: bool = False
) -> subprocess.CompletedProcess[str]:
    """Exit status and output of `python -m experiments.run` with `arguments` in `folder`. `env` is added to this
    process's environment."""
    own = {"OMP_NUM_THREADS": "1", **os.environ, **env}
    own.pop("PYTEST_CURRENT_TEST", None)
    return _interpreter(tuple(sorted(own.items()))).run(folder, *arguments, joined=joined)


@cache
def _interpreter(environment: tuple[tuple[str, str], ...]) -> WarmPython:
    return WarmPython(dict(environment))
