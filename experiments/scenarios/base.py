"""One question, one file. A scenario turns the cells of a run into rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from experiments.bench import Bench, Setup
from experiments.results import Row


class Scenario(ABC):
    """A question that a run answers."""

    name: ClassVar[str]
    in_step: ClassVar[bool] = False
    """Several processes can measure it at once: all that they do follows from its cells, and from no clock."""

    def open(self, setup: Setup) -> Bench:
        """What the cells are measured on: the model, loaded, unless a scenario needs none."""
        return Bench.open(setup)

    @abstractmethod
    def cells(self, bench: Bench) -> Sequence[Any]:
        """What is measured one by one; each has a `label` for the progress bar."""

    @abstractmethod
    def measure(self, bench: Bench, cell: Any) -> list[Row]:
        """The rows of one cell. What it raises becomes a failed row; the other cells go on."""

    def failed(self, bench: Bench, cell: Any, error: str) -> Row:
        """The row of a cell that raised, with its traceback."""
        return bench.row(
            self.name,
            context_tokens=getattr(cell, "context_tokens", 0),
            query_tokens=getattr(cell, "query_tokens", 0),
            status="failed",
            error=error,
        )
