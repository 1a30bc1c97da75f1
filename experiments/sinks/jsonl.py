"""rows.jsonl: one row a line. Each row is flushed when it is written, so a killed run keeps its rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from experiments.results import ROWS_FILE, Row
from experiments.sinks.base import Sink


class JSONL(Sink):
    """The sink of every run. Tables, plots and W&B runs can be created again from its file."""

    file: TextIO

    def check(self) -> None:
        pass

    def open(self, run_dir: Path, config: dict[str, Any], kept: Sequence[Row] = ()) -> None:
        self.file = (run_dir / ROWS_FILE).open("a" if kept else "w", encoding="utf-8")

    def write(self, row: Row) -> None:
        self.file.write(row.to_json() + "\n")
        self.file.flush()

    def close(self, run_dir: Path) -> None:
        self.file.close()
