"""The interface of a sink, a destination of rows. Each sink is one file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.results import Row


class Sink(ABC):
    """A destination of rows. A run calls `check` and `open`, then `write` for each row, then `close`."""

    @abstractmethod
    def check(self) -> None:
        """Raises ConfigError if this sink can't be written to. A run calls it before a model loads."""

    @abstractmethod
    def open(self, run_dir: Path, config: dict[str, Any], kept: Sequence[Row] = ()) -> None:
        """Prepares for writing.

        `run_dir` is the run's folder, `config` its resolved configuration. `kept` holds the rows that an interrupted
        run has measured already.
        """

    @abstractmethod
    def write(self, row: Row) -> None:
        """Writes one row. When it returns, the row is on disk or handed to the client of a server."""

    @abstractmethod
    def close(self, run_dir: Path) -> str | None:
        """Called after the report is written, or when the run is interrupted. Returns a line for the user, or None."""

    def send_later(self, run_dir: Path) -> str:
        """A sentence that says how the rows of a run's folder get to this sink after it has failed; "": no way."""
        return ""

    def abandon(self) -> None:
        """Called once after this sink has failed: releases what it holds, and raises nothing."""
        return None
