"""The interface of a scenario, a question that a run answers by measuring its cells."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic, Protocol, TypeVar, runtime_checkable

from experiments.bench import Bench, Setup
from experiments.results import Row
from kvmem.engines import Backend, backend_class
from kvmem.errors import ConfigError
from kvmem.registry import Registry


class Labelled(Protocol):
    """A cell: a scenario measures its cells one by one."""

    @property
    def label(self) -> str:
        """The cell's name in the progress bar, the log and the run's checkpoint."""


@runtime_checkable
class SizedCell(Labelled, Protocol):
    """A cell whose prompt has a known length."""

    @property
    def context_tokens(self) -> int: ...

    @property
    def query_tokens(self) -> int: ...


BenchT = TypeVar("BenchT")
"""The type that `Scenario.open` returns. Cells are measured on it."""
CellT = TypeVar("CellT", bound=Labelled)


class Scenario(ABC, Generic[BenchT, CellT]):
    """A question that a run answers. A new scenario is one new file in this package."""

    name: ClassVar[str]
    question: ClassVar[str]
    """The question in one sentence, the heading of the report."""
    lockstep: ClassVar[bool] = False
    """Whether several ranks can measure this scenario in lockstep.

    It requires that the work of a cell depends only on the cell, never on timing.
    """

    def check(self, setup: Setup) -> None:
        """Raises ConfigError for what is wrong with `setup` and can be known before a model loads."""
        return None

    @abstractmethod
    def open(self, setup: Setup) -> BenchT:
        """Prepares what the cells are measured on, such as a loaded model.

        Raises ConfigError if the setup does not fit the scenario.
        """

    @abstractmethod
    def cells(self, bench: BenchT) -> Sequence[CellT]:
        """The cells of the run, in the order in which they are measured.

        Raises ConfigError if the setup does not fit the scenario.
        """

    def resume(self, rows: Sequence[Row]) -> None:
        """Takes over what later cells need of the finished ones, before the other cells are measured."""
        return None

    @abstractmethod
    def measure(self, bench: BenchT, cell: CellT) -> list[Row]:
        """The rows of one cell. If it raises, the runner records a failed row and continues with the next cell."""

    @abstractmethod
    def failed(self, bench: BenchT, cell: CellT, error: str) -> Row:
        """The row of a cell that raised. `error` is the traceback."""

    @classmethod
    def answer(cls, rows: Sequence[Row]) -> str:
        """The answer to `question` in one sentence, or "" if the rows do not give one. All `rows` are valid."""
        return ""


class ModelScenario(Scenario[Bench, CellT]):
    """A scenario that measures a loaded model."""

    engines: ClassVar[tuple[type[Backend], ...]] = ()
    """The engines that it can measure; (): any."""
    measures_workload: ClassVar[bool] = True
    """Whether its cells come from the workload."""

    def check(self, setup: Setup) -> None:
        engine = setup.backend.backend
        if self.engines and not issubclass(backend_class(engine), self.engines):
            choices = " or ".join(f"backend={choice.name}" for choice in self.engines)
            raise ConfigError(
                f"scenario={self.name} can't measure backend={engine}. Use {choices}, or another scenario."
            )
        if self.measures_workload:
            setup.workload.check()

    def open(self, setup: Setup) -> Bench:
        return Bench.open(setup)

    def failed(self, bench: Bench, cell: CellT, error: str) -> Row:
        context_tokens, query_tokens = (
            (cell.context_tokens, cell.query_tokens) if isinstance(cell, SizedCell) else (0, 0)
        )
        return bench.row(
            self.name, context_tokens=context_tokens, query_tokens=query_tokens, status="failed", error=error
        )


SCENARIOS = Registry(Scenario, "experiments.scenarios", "scenario")
