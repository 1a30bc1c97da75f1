"""Reprefill: a joint prefill of the merged ids. Exact, and as slow as the prompt. The default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from transformers import DynamicCache, PreTrainedModel

from kvmem.cache import KVCacheItem, dynamic_cache
from kvmem.merge.base import MergeStrategy, merged_tokens
from kvmem.models import prefill


@dataclass(config=ConfigDict(extra="forbid"))
class Reprefill(MergeStrategy):
    """Ignores the stored caches and prefills header + body 1 + separator + body 2 + … in one pass.

    Every body attends to the bodies before it, so the answer, and the cost, are those of the text as a prompt.
    """

    name: ClassVar[str] = "Reprefill"
    exact: ClassVar[bool] = True

    def merge(
        self, items: Sequence[KVCacheItem], separator_ids: tuple[int, ...], model: PreTrainedModel
    ) -> DynamicCache:
        cache = dynamic_cache.empty(model.config)
        prefill(model, merged_tokens(items, separator_ids).token_ids, cache)
        return cache
