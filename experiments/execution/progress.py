"""Shows the progress of a run: a progress bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

import rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.scenarios import Labelled

log = logging.getLogger("experiments")


C = TypeVar("C", bound=Labelled)


class ConsoleHandler(logging.Handler):
    """Prints log lines through rich's console, above a progress bar and without line breaks of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        rich.get_console().print(self.format(record), markup=False, highlight=False, soft_wrap=True)


class LogFile(logging.FileHandler):
    """The log in the run's folder, opened at the first line. Where a line can't be written, only the console has it."""

    def __init__(self, filename: str) -> None:
        super().__init__(filename, encoding="utf-8", delay=True)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # of opening the file
            return


def track(cells: Sequence[C]) -> Iterator[C]:
    """Yields the cells one by one, and shows how many are done."""
    if not sys.stdout.isatty():
        for number, cell in enumerate(cells, start=1):
            log.info("[%d/%d] %s", number, len(cells), cell.label)
            yield cell
        return
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=rich.get_console()) as bar:
        task = bar.add_task("cells", total=len(cells))
        for cell in cells:
            bar.update(task, description=f"cell {cell.label}")
            yield cell
            bar.advance(task)
