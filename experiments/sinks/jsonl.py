"""rows.jsonl: one row a line, flushed as it is written, so that a killed run keeps what it measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from experiments.row import Row
from experiments.sinks import Sink

FILENAME = "rows.jsonl"


class JSONL(Sink):
    """Always on: the rows' one source of truth, from which tables, plots and other sinks can be made again."""

    file: TextIO

    def check(self) -> None:
        pass

    def open(self, run_dir: Path, config: dict[str, Any], kept: Sequence[Row] = ()) -> None:
        self.file = (run_dir / FILENAME).open("a" if kept else "w", encoding="utf-8")

    def write(self, row: Row) -> None:
        self.file.write(row.to_json() + "\n")
        self.file.flush()

    def close(self, run_dir: Path) -> None:
        self.file.close()


def read_rows(run_dir: Path) -> list[Row]:
    """The whole rows of a run's folder; a last line that a kill cut short is left out."""
    lines = (run_dir / FILENAME).read_text(encoding="utf-8").splitlines(keepends=True)
    return [Row.from_json(line) for line in lines if line.endswith("\n")]
