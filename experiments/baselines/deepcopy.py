"""A deep copy of the stored cache for every query. It is safe, but copies every byte of the memory."""

from __future__ import annotations

import copy
from typing import ClassVar

from transformers import DynamicCache

from experiments.baselines.base import Recipe


class DeepCopy(Recipe):
    """Copies the stored cache, so that the forward can't change it."""

    name: ClassVar[str] = "deepcopy"

    def cache(self) -> DynamicCache:
        return copy.deepcopy(self.item.kv_cache)
