"""No sink besides rows.jsonl, which every run writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from experiments.results import Row
from experiments.sinks.base import Sink


@dataclass(config=ConfigDict(extra="forbid"))
class NoSink(Sink):
    """Ignores all rows."""

    def check(self) -> None:
        pass

    def open(self, run_dir: Path, config: dict[str, Any], kept: Sequence[Row] = ()) -> None:
        pass

    def write(self, row: Row) -> None:
        pass

    def close(self, run_dir: Path) -> None:
        pass
