"""Contexts × queries of exact token counts: what the workloads with a free length share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated

from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass as card

from experiments.workloads.base import Cell, Workload
from experiments.workloads.cut import cut_memories, cut_question, held
from kvmem.prompt import PromptTemplate


@dataclass(frozen=True)
class Ask:
    """One question in several wordings, and the fact that answers it, where it can be checked."""

    variants: tuple[str, ...]
    truth: str | None = None


@dataclass(frozen=True)
class Texts:
    """What the cells of one context are cut from: a text for each memory, a passage that long questions quote, and the
    question to ask once it is known what the cut memories hold."""

    memories: tuple[str, ...]
    passage: str
    ask: Callable[[Sequence[str]], Ask]


def labels(counts: Sequence[int]) -> dict[int, str]:
    """short, medium and long for three counts, in order of length; else each count itself.

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
    """The cells, context by context in the given order; the cells of one context share their memories.

    `texts(i)` gives the text of the i-th context. Raises PromptError, naming the knob, for a count out of reach.
    """
    context_labels, query_labels = labels(context_tokens), labels(query_tokens)
    for i, context in enumerate(context_tokens):
        source = texts(i)
        memories = cut_memories(source.memories, context, template, separator, what)
        ask = source.ask(memories)
        tokens = held(template, memories, separator)
        for query in query_tokens:
            yield Cell(
                context=context_labels[context],
                context_tokens=context,
                query=query_labels[query],
                query_tokens=query,
                memories=memories,
                truth=ask.truth,
                question=cut_question(ask.variants, source.passage, query, context, tokens, template, what),
            )


@card(config=ConfigDict(extra="forbid"))
class GridWorkload(Workload):
    """A workload of exact token counts, every context with every query.

    context_tokens, query_tokens: the verified split of the whole prompt, template included; every pair is a cell.
    memories: how many memories hold the context together, joined by the configured merge.
    """

    context_tokens: Annotated[list[PositiveInt], Field(min_length=1)] = field(default_factory=lambda: [256, 512, 1024])
    query_tokens: Annotated[list[PositiveInt], Field(min_length=1)] = field(default_factory=lambda: [32, 64, 128])
    memories: PositiveInt = 1
    seed: int = 0
    max_cells: PositiveInt | None = None

    @abstractmethod
    def texts(self, context: int) -> Texts:
        """The text that the cells of the `context`-th context are cut from."""

    def cells(self, template: PromptTemplate, separator: str) -> Sequence[Cell]:
        cells = grid(self.context_tokens, self.query_tokens, self.texts, template, separator, "workload")
        return list(islice(cells, self.max_cells))
