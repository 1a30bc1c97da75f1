"""rows.jsonl: one row a line. Each row is flushed when it is written, so a killed run keeps its rows."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.results import ROWS_FILE, Row
from experiments.sinks.base import Sink
from kvmem.errors import StorageError
from kvmem.storage import write_all


class JSONL(Sink):
    """The sink of every run. Tables, plots and W&B runs can be created again from its file.

    The file holds whole lines only: what a full disk cut short is removed, and StorageError is raised.
    """

    file: io.FileIO

    def check(self) -> None:
        pass

    def open(self, run_dir: Path, config: dict[str, Any], kept: Sequence[Row] = ()) -> None:
        self.path = run_dir / ROWS_FILE
        try:
            self.file = io.FileIO(self.path, "ab" if kept else "wb")
        except OSError as error:
            raise StorageError(f"{self.path} can't be written ({error}).") from error

    def write(self, row: Row) -> None:
        end = self.file.tell()
        try:
            write_all(self.file, memoryview(f"{row.to_json()}\n".encode()))
        except OSError as error:
            self.file.truncate(end)
            raise StorageError(
                f"{self.path} can't be written ({error}). The rows in it are whole. Make room; the same command with "
                f"hydra.run.dir={self.path.parent} goes on with the others."
            ) from error

    def close(self, run_dir: Path) -> None:
        self.file.close()
