"""Caches one behind the other, as published: every block after the first keeps the positions that it was built at."""

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
    """Concatenates the stored keys and values (MemOS, KVCacheMemory.get_cache). Not exact; a lower bound.

    Blocks after the first did not see those before them, and their keys stand at the wrong positions.
    """

    name: ClassVar[str] = "NaiveConcat"
    exact: ClassVar[bool] = False

    def move(self, layers: Sequence[KV], offsets_T: torch.Tensor, model: PreTrainedModel) -> None:
        """They stay."""
