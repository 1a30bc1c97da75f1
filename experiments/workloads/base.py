"""One source of text, one file. A workload gives the cells of a run: memories, a question, and their token counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from kvmem.cache import Source
from kvmem.prompt import PromptTemplate


@dataclass(frozen=True)
class Cell:
    """One cell: `memories` are stored, `question` is asked behind them.

    `context_tokens` and `query_tokens` are the two halves of the verified split of the whole prompt, template included.
    `context` and `query` are labels for the tables ("long", "short"); `truth` is the checkable fact, if there is one.
    """

    context: str
    context_tokens: int
    query: str
    query_tokens: int
    memories: tuple[Source, ...]
    question: str
    truth: str | None = None

    @property
    def label(self) -> str:
        return f"{self.context_tokens}/{self.query_tokens}"


class Workload(ABC):
    """Where a run's text comes from."""

    @abstractmethod
    def cells(self, template: PromptTemplate, separator: str) -> Sequence[Cell]:
        """Every cell of the run, in order; memories of one cell are joined by `separator` when they are merged."""
