"""Strategies of the tests: heads of different lengths, and entries that stand there twice."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass

from kvmem.compaction import CompactionStrategy, Head, Memory, TokenChoice


@dataclass
class Uneven(TokenChoice):
    """Every head of every layer keeps another number of entries, one head a single one."""

    name: ClassVar[str] = "Uneven"

    def scores(self, memory):
        raise NotImplementedError

    def chosen(self, memory: Memory) -> list[list[torch.Tensor]]:
        chance = torch.Generator().manual_seed(3)
        return [
            [
                torch.randperm(memory.tokens, generator=chance)[: 1 + 7 * layer + 5 * head].sort().values
                for head in range(keys.shape[1])
            ]
            for layer, (keys, _) in enumerate(memory.layers)
        ]


@dataclass
class Doubled(CompactionStrategy):
    """Keeps everything, in another order, and some entries twice with log(1/2) added to their scores: the same memory.

    bias: what is added instead; 0 counts those entries twice.
    """

    bias: float = -math.log(2.0)

    name: ClassVar[str] = "Doubled"

    def compact(self, memory: Memory) -> list[list[Head]]:
        layers = []
        for layer, (keys, values) in enumerate(memory.layers):
            heads = []
            for head in range(keys.shape[1]):
                order = torch.randperm(memory.tokens, generator=torch.Generator().manual_seed(10 * layer + head))
                twice = order[: 3 + layer + 2 * head]
                at_N = torch.cat([order, twice])
                bias_N = torch.isin(at_N, twice) * self.bias
                heads.append(Head(keys[0, head, at_N], values[0, head, at_N], bias_N))
            layers.append(heads)
        return layers
