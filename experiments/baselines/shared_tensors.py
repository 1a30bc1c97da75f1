"""A plain DynamicCache whose layers refer to the stored tensors. Nothing is copied before the forward."""

from __future__ import annotations

from typing import ClassVar, cast

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from experiments.baselines.base import Recipe
from kvmem.cache import dynamic_cache


class SharedTensors(Recipe):
    """The simplest correct method with transformers' own forward."""

    name: ClassVar[str] = "shared tensors"

    def cache(self) -> DynamicCache:
        cache = DynamicCache(config=self.config)
        layers = cast("list[DynamicLayer]", cache.layers)
        for layer, (keys, values) in zip(layers, dynamic_cache.layers_of(self.item.kv_cache), strict=True):
            layer.keys, layer.values, layer.is_initialized = keys, values, True
            layer.dtype, layer.device = keys.dtype, keys.device
        return cache
