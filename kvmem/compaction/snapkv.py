"""SnapKV: keeps the entries around those that get most attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch.nn.functional import avg_pool1d

from kvmem.compaction.base import Memory
from kvmem.compaction.observed_queries import Behind
from kvmem.compaction.token_choice import TokenChoice


@dataclass(config=ConfigDict(extra="forbid"))
class SnapKV(TokenChoice):
    """Scores an entry by the mean attention that it and its neighbours get while the model repeats the memory.

    Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", 2024 (arXiv 2404.14469). The paper takes
    the prompt's last tokens, which ask the question. A memory is built before any question, so the queries are those of
    the repeated text.
    """

    pool: int = Field(default=5, ge=1)
    """How many neighbouring tokens share a score; an odd number."""

    name: ClassVar[str] = "SnapKV"

    def scores(self, memory: Memory) -> Sequence[torch.Tensor]:
        found: list[torch.Tensor] = []

        def see(layer: int, behind: Behind) -> None:
            keys_HSD = memory.layers[layer][0][0]
            sums = [
                torch.stack([part.sum(dim=(0, 1)) for part in behind.attention(head, keys_SD)]).sum(dim=0)
                for head, keys_SD in enumerate(keys_HSD)
            ]
            scores_HT = torch.stack(sums)[:, : memory.tokens]
            found.append(avg_pool1d(scores_HT, self.pool, stride=1, padding=self.pool // 2)[:, : memory.tokens])

        memory.observe(see)
        return found
