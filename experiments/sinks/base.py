"""One destination of rows, one file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.results import Row


class Sink(ABC):
    """Takes rows as they are measured: `check`, `open`, `write` once a row, `close`."""

    @abstractmethod
    def check(self) -> None:
        """Raises ConfigError where this sink can't be written to; asked before any model loads."""

    @abstractmethod
    def open(self, run_dir: Path, config: dict[str, Any], kept: Sequence[Row] = ()) -> None:
        """`run_dir` is the run's folder, `config` its resolved configuration, `kept` the rows of a resumed run."""

    @abstractmethod
    def write(self, row: Row) -> None:
        """Takes one row; it is safe on disk, or on its way, when this returns."""

    @abstractmethod
    def close(self, run_dir: Path) -> str | None:
        """Called once the report is written, or the run was broken off. A line for the user, if there is one to say."""
