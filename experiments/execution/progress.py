"""What a run shows as it goes: a progress bar where there is a terminal, plain lines where there is none."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

import rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
log = logging.getLogger("experiments")


class ConsoleHandler(logging.Handler):
    """Log lines through rich's console, so that they stand above a running bar and don't tear it; never wrapped."""

    def emit(self, record: logging.LogRecord) -> None:
        rich.get_console().print(self.format(record), markup=False, highlight=False, soft_wrap=True)


def over(cells: Sequence[T]) -> Iterator[T]:
    """The cells one by one; each has a `label`."""
    if not sys.stdout.isatty():
        for number, cell in enumerate(cells, start=1):
            log.info("[%d/%d] %s", number, len(cells), cell.label)  # type: ignore[attr-defined]
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
            bar.update(task, description=f"cell {cell.label}")  # type: ignore[attr-defined]
            yield cell
            bar.advance(task)
