"""KVzip: keeps the entries that are needed to repeat the memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from kvmem.compaction.base import Memory
from kvmem.compaction.observed_queries import Behind
from kvmem.compaction.token_choice import TokenChoice, entries_of


@dataclass(config=ConfigDict(extra="forbid"))
class KVzip(TokenChoice):
    """Scores an entry by the largest attention that it gets while the model repeats the memory. One more prefill.

    The best entries of all layers and heads together are kept, so heads differ in length; each keeps at least one. Kim
    et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", 2025 (arXiv 2505.23416). The paper
    repeats a long text in chunks; here it is repeated at once.
    """

    name: ClassVar[str] = "KVzip"

    def scores(self, memory: Memory) -> Sequence[torch.Tensor]:
        found: list[torch.Tensor] = []

        def see(layer: int, behind: Behind) -> None:
            keys_HSD = memory.layers[layer][0][0]
            largest = [
                torch.stack([part.amax(dim=(0, 1)) for part in behind.attention(head, keys_SD)]).amax(dim=0)
                for head, keys_SD in enumerate(keys_HSD)
            ]
            found.append(torch.stack(largest)[:, : memory.tokens])

        memory.observe(see)
        return found

    def chosen(self, memory: Memory) -> list[list[torch.Tensor]]:
        scores_LHT = torch.stack(list(self.scores(memory)))
        layers, heads, tokens = scores_LHT.shape
        best_LH1 = scores_LHT.argmax(dim=-1, keepdim=True)
        scores_LHT = scores_LHT.scatter(-1, best_LH1, torch.inf)
        count = max(layers * heads, entries_of(self.ratio, layers * heads * tokens))
        kept_LHT = torch.zeros_like(scores_LHT, dtype=torch.bool)
        kept_LHT.view(-1)[scores_LHT.flatten().topk(count).indices] = True
        return [[kept_T.nonzero()[:, 0] for kept_T in kept_HT] for kept_HT in kept_LHT]
