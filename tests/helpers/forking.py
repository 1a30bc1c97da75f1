"""Processes that write files over and over until they are killed, forked from one that has imported everything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]

MOTHER = """
import os, sys
import torch
torch.set_num_threads(1)  # a fork has no threads of its mother's
{setup}
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        while True:
            {work}
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


class Mother:
    """Starts one child at a time, which runs `work` in a loop."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(self) -> int:
        """The process id of a new child, which is at work."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return int(self._answer())

    def kill(self, child: int) -> None:
        """Kills the child as `kill -9` does, and waits for its end."""
        os.kill(child, signal.SIGKILL)
        assert self._answer() == "ended"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def mother(setup: str, work: str, *arguments: str) -> Iterator[Mother]:
    """`setup` and `work` are Python: statements, and one statement. `arguments` are in `sys.argv`."""
    code = MOTHER.format(setup=setup, work=work)
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield Mother(process)
        assert process.stdin is not None
        process.stdin.close()
