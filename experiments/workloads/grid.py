"""A grid of contexts and queries with exact token counts, the base of workloads whose texts can have any length."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated

from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass as card

from experiments.workloads.base import Cell, Workload
from experiments.workloads.cut import cut_memories, cut_question, memory_tokens
from kvmem.prompt import PromptTemplate


@dataclass(frozen=True)
class Question:
    """One question in several wordings. `truth` is the fact that answers it, if it is known."""

    variants: tuple[str, ...]
    truth: str | None = None


@dataclass(frozen=True)
class Texts:
    """The texts of the cells of one context."""

    memories: tuple[str, ...]
    """A text for each memory, before it is cut."""
    passage: str
    """The text that long questions quote."""
    question_for: Callable[[Sequence[str]], Question]
    """Chooses the question for the memories as they are cut."""


def labels(counts: Sequence[int]) -> dict[int, str]:
    """A label for each count: short, medium and long for three counts, else the number itself.

    >>> labels([1024, 256, 512])
    {256: 'short', 512: 'medium', 1024: 'long'}
    >>> labels([256, 512])
    {256: '256', 512: '512'}
    """
    distinct = sorted(set(counts))
    names = ("short", "medium", "long") if len(distinct) == 3 else tuple(map(str, distinct))
    return dict(zip(distinct, names, strict=True))


def grid(
    context_tokens: Sequence[int],
    query_tokens: Sequence[int],
    texts: Callable[[int], Texts],
    template: PromptTemplate,
    separator: str,
    what: str,
    labels: Callable[[Sequence[int]], dict[int, str]] = labels,
) -> Iterator[Cell]:
    """The cells, context by context in the given order. The cells of one context share their memories.

    `texts(i)` returns the texts of the i-th context. `what` names the workload in errors. Raises PromptError, with the
    name of the knob, if a count is out of reach.
    """
    context_labels, query_labels = labels(context_tokens), labels(query_tokens)
    for i, context in enumerate(context_tokens):
        source = texts(i)
        memories = cut_memories(source.memories, context, template, separator, what)
        asked = source.question_for(memories)
        tokens = memory_tokens(template, memories, separator)
        for query in query_tokens:
            yield Cell(
                context=context_labels[context],
                context_tokens=context,
                query=query_labels[query],
                query_tokens=query,
                memories=memories,
                truth=asked.truth,
                question=cut_question(asked.variants, source.passage, query, context, tokens, template, what),
            )


@card(config=ConfigDict(extra="forbid"))
class GridWorkload(Workload):
    """A workload with exact token counts.

    context_tokens, query_tokens: the lengths of the two parts of the verified split of the whole prompt, template
        included. Each pair is a cell.
    memories: the number of memories that make up a context. The configured merge joins them.
    max_cells: use only the first cells; null uses all.
    """

    context_tokens: Annotated[list[PositiveInt], Field(min_length=1)] = field(default_factory=lambda: [256, 512, 1024])
    query_tokens: Annotated[list[PositiveInt], Field(min_length=1)] = field(default_factory=lambda: [32, 64, 128])
    memories: PositiveInt = 1
    seed: int = 0
    max_cells: PositiveInt | None = None

    @abstractmethod
    def texts(self, context: int) -> Texts:
        """The texts of the cells of the `context`-th context."""

    def cells(self, template: PromptTemplate, separator: str) -> Sequence[Cell]:
        cells = grid(self.context_tokens, self.query_tokens, self.texts, template, separator, "workload")
        return list(islice(cells, self.max_cells))
