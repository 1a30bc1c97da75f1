"""StreamingLLM: keeps the first entries and the last ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from kvmem.compaction.base import Memory
from kvmem.compaction.token_choice import TokenChoice


@dataclass(config=ConfigDict(extra="forbid"))
class StreamingLLM(TokenChoice):
    """Keeps the first `sinks` entries, which take up the attention that has no other target, and the last ones.

    Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023 (arXiv 2309.17453). Positions stay
    those of the text; the paper numbers the kept tokens anew.
    """

    sinks: int = Field(default=4, ge=0)
    """How many entries at the start are kept before any other."""

    name: ClassVar[str] = "StreamingLLM"

    def scores(self, memory: Memory) -> Sequence[torch.Tensor]:
        keys = memory.layers[0][0]
        scores_T = torch.arange(memory.tokens, dtype=torch.float32, device=keys.device)
        scores_T[: self.sinks] += memory.tokens
        return [scores_T.expand(keys.shape[1], -1) for keys, _ in memory.layers]
