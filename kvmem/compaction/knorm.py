"""Knorm: keeps the entries whose keys are shortest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from kvmem.compaction.base import Memory
from kvmem.compaction.token_choice import TokenChoice


@dataclass(config=ConfigDict(extra="forbid"))
class Knorm(TokenChoice):
    """Keeps the entries whose keys have the smallest Euclidean norm, which are attended to most. Needs no forward pass.

    Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", 2024 (arXiv 2406.11430).
    """

    name: ClassVar[str] = "Knorm"

    def scores(self, memory: Memory) -> Sequence[torch.Tensor]:
        return [-keys[0].float().norm(dim=-1) for keys, _ in memory.layers]
