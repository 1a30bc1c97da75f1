"""Contexts × queries of exact token counts: what the workloads with a free length share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from experiments.workloads import Cell
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
