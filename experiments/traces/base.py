"""The interface of a trace family: a sequence of memory uses, and of edits that change a memory's text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from kvmem.registry import Registry


@dataclass(frozen=True)
class Event:
    """A use of a memory by a query, or an edit of its text. `memory` is an index into the trace's `tokens`."""

    kind: Literal["use", "edit"]
    memory: int


@dataclass(frozen=True)
class Trace:
    """`events` in order of time; `tokens` is the length of each memory, `query_tokens` that of every query."""

    family: str
    seed: int
    tokens: tuple[int, ...]
    query_tokens: int
    events: tuple[Event, ...]

    @property
    def uses(self) -> int:
        return sum(event.kind == "use" for event in self.events)


class TraceFamily(ABC):
    """A kind of traffic. A new family is one new file in this package; its fields are its knobs."""

    name: ClassVar[str]

    @abstractmethod
    def events(self, memories: int, uses: int, rng: np.random.Generator) -> list[Event]:
        """`uses` uses of `memories` memories, with this family's edits between them."""

    def draw(self, memories: int, uses: int, seed: int, query_tokens: int) -> Trace:
        """The trace of `seed`, with memory lengths drawn log-uniformly from 128 to 1024 tokens."""
        rng = np.random.default_rng([seed, sum(self.name.encode())])
        tokens = tuple(int(length) for length in np.exp(rng.uniform(np.log(128), np.log(1024), memories)))
        return Trace(self.name, seed, tokens, query_tokens, tuple(self.events(memories, uses, rng)))


FAMILIES = Registry(TraceFamily, "experiments.traces", "family of traces")


def zipf_shares(memories: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """(memories,): popularity ~ rank^-exponent with random ranks; sums to 1."""
    shares = np.arange(1, memories + 1, dtype=float) ** -exponent
    rng.shuffle(shares)
    return np.asarray(shares / shares.sum())
