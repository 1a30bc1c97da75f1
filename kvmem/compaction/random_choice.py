"""RandomChoice: keeps entries at random, as a control for the other strategies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from kvmem.compaction.base import Memory
from kvmem.compaction.token_choice import TokenChoice


@dataclass(config=ConfigDict(extra="forbid"))
class RandomChoice(TokenChoice):
    """Keeps entries at random, other ones in each layer and head. A strategy that is no better has learned nothing."""

    seed: int = Field(default=0, ge=0)
    """Equal seeds give equal choices for memories of equal shape."""

    name: ClassVar[str] = "RandomChoice"

    def scores(self, memory: Memory) -> Sequence[torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return [
            torch.rand(keys.shape[1], memory.tokens, generator=generator).to(keys.device) for keys, _ in memory.layers
        ]
