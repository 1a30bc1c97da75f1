"""MemOS's way: the stored cache itself is passed in, every position's logits come out, and it is cropped afterwards."""

from __future__ import annotations

import copy
from typing import ClassVar

from transformers import DynamicCache, PreTrainedConfig

from experiments.baselines.base import Recipe
from kvmem.cache import KVCacheItem, dynamic_cache


class MemOS(Recipe):
    """The forward grows the stored cache; cropping it makes it the memory again."""

    name: ClassVar[str] = "memos"
    logits_to_keep: ClassVar[int] = 0

    def __init__(self, item: KVCacheItem, config: PreTrainedConfig) -> None:
        super().__init__(item, config)
        self.stored = copy.deepcopy(item.kv_cache)  # the item is lent to other arms too

    def cache(self) -> DynamicCache:
        return self.stored

    def put_back(self, cache: DynamicCache) -> None:
        dynamic_cache.crop(cache, self.item.metadata.token_count)
