"""MemOS's method: the model receives the stored cache itself and computes all logits. Then the cache is cropped."""

from __future__ import annotations

import copy
from typing import ClassVar

from transformers import DynamicCache, PreTrainedConfig

from experiments.baselines.base import Recipe
from kvmem.cache import KVCacheItem, dynamic_cache


class MemOS(Recipe):
    """The forward appends to the stored cache. Cropping removes what it appended."""

    name: ClassVar[str] = "memos"
    logits_to_keep: ClassVar[int] = 0

    def __init__(self, item: KVCacheItem, config: PreTrainedConfig) -> None:
        super().__init__(item, config)
        self.stored = copy.deepcopy(item.kv_cache)  # other arms use the same item

    def cache(self) -> DynamicCache:
        return self.stored

    def restore(self, cache: DynamicCache) -> None:
        dynamic_cache.crop(cache, self.item.metadata.token_count)
