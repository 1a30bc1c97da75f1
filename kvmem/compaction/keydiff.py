"""KeyDiff: keeps the entries whose keys differ most from the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch.nn.functional import normalize

from kvmem.compaction.base import Memory
from kvmem.compaction.token_choice import TokenChoice


@dataclass(config=ConfigDict(extra="forbid"))
class KeyDiff(TokenChoice):
    """Keeps the entries whose keys are least similar to the mean direction of all keys. Needs no forward pass.

    Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained
    Environments", 2025 (arXiv 2504.15364).
    """

    name: ClassVar[str] = "KeyDiff"

    def scores(self, memory: Memory) -> Sequence[torch.Tensor]:
        scores = []
        for keys, _ in memory.layers:
            directions_HTD = normalize(keys[0].float(), dim=-1)
            mean_HD = normalize(directions_HTD.mean(dim=1), dim=-1)
            scores.append(-torch.einsum("htd,hd->ht", directions_HTD, mean_HD))
        return scores
