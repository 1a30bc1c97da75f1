"""A sink of a user, which fails."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from experiments.results import Row
from experiments.sinks import Sink


@dataclass(config=ConfigDict(extra="forbid"))
class Broken(Sink):
    """Raises an error of no known kind at one of its steps."""

    at: str = "write"

    def _step(self, name: str) -> None:
        if name == self.at:
            raise ZeroDivisionError(f"the sink breaks at {name}\nsecond line")

    def check(self) -> None:
        self._step("check")

    def open(self, run_dir: Path, config: dict[str, Any], kept: Sequence[Row] = ()) -> None:
        self._step("open")

    def write(self, row: Row) -> None:
        self._step("write")

    def close(self, run_dir: Path) -> str | None:
        self._step("close")
        return "closed"
