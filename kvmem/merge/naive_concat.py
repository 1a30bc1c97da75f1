"""NaiveConcat: stored caches concatenated as published; every block keeps the positions that it was built at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from transformers import PreTrainedModel

from kvmem.cache import KV
from kvmem.merge.concat import ConcatStrategy


@dataclass(config=ConfigDict(extra="forbid"))
class NaiveConcat(ConcatStrategy):
    """Concatenates the stored keys and values, as MemOS's KVCacheMemory.get_cache does. Not exact; a lower bound.

    Blocks after the first were built without the blocks before them, and their keys have the wrong positions.
    """

    name: ClassVar[str] = "NaiveConcat"
    exact: ClassVar[bool] = False

    def shift_keys(self, layers: Sequence[KV], offsets_T: torch.Tensor, model: PreTrainedModel) -> None:
        """Leaves the keys as they are."""
