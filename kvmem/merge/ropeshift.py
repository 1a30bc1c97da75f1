"""Caches one behind the other, their keys rotated to where they now stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from transformers import DynamicCache, PreTrainedModel

from kvmem.cache import KV, KVCacheItem
from kvmem.merge.concat import ConcatStrategy
from kvmem.merge.rope import Turn, check_rotatable, inverse_frequencies, rotate


@dataclass(config=ConfigDict(extra="forbid"))
class RopeShift(ConcatStrategy):
    """Concatenates the stored values, and the keys turned by R(Δ) (PromptCache, Gim et al. 2024, and others since).

    Equal to a joint prefill at layer 0, and for a single memory. Not exact beyond: a block did not see those before it.
    Covers full attention of the Llama, Mistral, Qwen2 and Qwen3 families whose frequencies don't change with length.
    """

    name: ClassVar[str] = "RopeShift"
    exact: ClassVar[bool] = False

    def merge(
        self, items: Sequence[KVCacheItem], separator_ids: tuple[int, ...], model: PreTrainedModel
    ) -> DynamicCache:
        check_rotatable(model.config, self.name)
        return super().merge(items, separator_ids, model)

    def move(self, layers: Sequence[KV], offsets_T: torch.Tensor, model: PreTrainedModel) -> None:
        turn = Turn.by(offsets_T, inverse_frequencies(model).to(offsets_T.device))
        for keys_BHTD, _ in layers:
            rotate(keys_BHTD, turn)
