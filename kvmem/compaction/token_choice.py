"""The base of the strategies that keep some of a memory's own entries, bit by bit, and drop the others."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from kvmem.compaction.base import CompactionStrategy, Head, Memory


@dataclass(config=ConfigDict(extra="forbid"))
class TokenChoice(CompactionStrategy):
    """Keeps the entries of the highest score, in each layer and KV head as many."""

    ratio: float = Field(default=0.1, gt=0, le=1)
    """The share of the entries that is kept, rounded up to whole entries."""

    @abstractmethod
    def scores(self, memory: Memory) -> Sequence[torch.Tensor]:
        """Of each layer, (kv_heads, tokens). Entries of a higher score are kept first."""

    def chosen(self, memory: Memory) -> list[list[torch.Tensor]]:
        """The positions that each layer's KV heads keep, ascending, (entries,) int64."""
        count = entries_of(self.ratio, memory.tokens)
        return [[scores_T.topk(count).indices.sort()[0] for scores_T in scores_HT] for scores_HT in self.scores(memory)]

    @torch.inference_mode()
    def compact(self, memory: Memory) -> list[list[Head]]:
        return [
            [Head(keys[0, head, at_N], values[0, head, at_N]) for head, at_N in enumerate(chosen)]
            for (keys, values), chosen in zip(memory.layers, self.chosen(memory), strict=True)
        ]


def entries_of(ratio: float, tokens: int) -> int:
    """How many of `tokens` entries a ratio keeps: rounded up, so at least one.

    >>> entries_of(0.1, 41), entries_of(1.0, 41), entries_of(0.3, 10)
    (5, 41, 3)
    """
    return min(tokens, max(1, math.ceil(round(ratio * tokens, 6))))
