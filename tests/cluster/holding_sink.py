"""A sink that holds jobs of a sweep in the middle of their run, so that a test can end them there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from experiments.results import Row
from experiments.sinks import Sink


@dataclass(config=ConfigDict(extra="forbid"))
class Holding(Sink):
    """Waits at the second row of each process that runs one of these jobs, until a file exists.

    The cell of the first row is then recorded as finished, and that of the second row is not.
    """

    until: str
    jobs: list[int]

    def check(self) -> None:
        pass

    def open(self, run_dir: Path, config: dict[str, Any], kept: Sequence[Row] = ()) -> None:
        self._rows_left = 2 if run_dir.name in map(str, self.jobs) else 0

    def write(self, row: Row) -> None:
        self._rows_left -= 1
        while self._rows_left == 0 and not Path(self.until).exists():
            time.sleep(0.05)

    def close(self, run_dir: Path) -> None:
        pass
