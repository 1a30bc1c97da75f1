"""The interface of a workload. A workload gives the cells of a run: memories, a question, and their token counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from kvmem.cache import Source
from kvmem.prompt import PromptTemplate


@dataclass(frozen=True)
class Cell:
    """One cell of a run: stored memories, and a question that follows them in the prompt.

    `context_tokens` and `query_tokens` are the lengths of the two parts of the verified split of the whole prompt,
    template included. `context` and `query` are labels for the tables ("long", "short"). `truth` is the fact that
    answers the question, if it is known.
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

    def check(self) -> None:
        """Raises ConfigError for what is wrong without a model, such as a missing file. Called before one loads."""
        return None

    @abstractmethod
    def cells(self, template: PromptTemplate, separator: str) -> Sequence[Cell]:
        """Every cell of the run, in order. A merge joins the memories of one cell with `separator`.

        Raises PromptError if a text can't have the wanted token count.
        """
