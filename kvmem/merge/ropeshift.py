"""RopeShift: stored caches concatenated, with their keys rotated to the new positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from transformers import DynamicCache, PreTrainedModel

from kvmem.cache import KV, KVCacheItem
from kvmem.merge.concat import ConcatStrategy
from kvmem.merge.rope import Rotation, check_rotatable, inverse_frequencies, rotate


@dataclass(config=ConfigDict(extra="forbid"))
class RopeShift(ConcatStrategy):
    """Concatenates the stored values, and the keys rotated by R(Δ). Not exact.

    Equals a joint prefill in layer 0 and for a single memory. In deeper layers it differs, because a block was built
    without the blocks before it. Supports full attention in the Llama, Mistral, Qwen2 and Qwen3 families with
    frequencies that do not change with the length. Gim et al., "Prompt Cache", 2024.
    """

    name: ClassVar[str] = "RopeShift"
    exact: ClassVar[bool] = False

    def merge(
        self, items: Sequence[KVCacheItem], separator_ids: tuple[int, ...], model: PreTrainedModel
    ) -> DynamicCache:
        check_rotatable(model.config, self.name)
        return super().merge(items, separator_ids, model)

    def shift_keys(self, layers: Sequence[KV], offsets_T: torch.Tensor, model: PreTrainedModel) -> None:
        rotation = Rotation.by(offsets_T, inverse_frequencies(model).to(offsets_T.device))
        for keys_BHTD, _ in layers:
            rotate(keys_BHTD, rotation)
