"""RopeShift: stored caches concatenated, with their keys rotated to the new positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from transformers import PreTrainedModel

from kvmem.cache import KV, KVCacheItem
from kvmem.merge.concat import ConcatStrategy
from kvmem.merge.proof import proof_of


@dataclass(config=ConfigDict(extra="forbid"))
class RopeShift(ConcatStrategy):
    """Concatenates the stored values, and the keys rotated by R(Δ). Not exact.

    Equals a joint prefill in layer 0 and for a single memory. In deeper layers it differs, because a block was built
    without the blocks before it. Covers a model if a probe shows that its keys move like this: see `proof`. Gim et al.,
    "Prompt Cache", 2024.
    """

    name: ClassVar[str] = "RopeShift"
    exact: ClassVar[bool] = False

    def check(self, items: Sequence[KVCacheItem], tokens: int, model: PreTrainedModel) -> None:
        super().check(items, tokens, model)
        lengths = [item.metadata.token_count for item in items]
        proof_of(model).check_lengths(model, lengths, tokens)

    def shift_keys(self, layers: Sequence[KV], offsets_T: torch.Tensor, model: PreTrainedModel) -> None:
        new_T = torch.arange(len(offsets_T), device=offsets_T.device)
        proof_of(model).move(model, layers, new_T - offsets_T, new_T)
