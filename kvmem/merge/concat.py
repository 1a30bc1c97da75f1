"""What the strategies that put stored blocks one behind the other share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
from transformers import DynamicCache, PreTrainedModel

from kvmem import dynamic_cache
from kvmem.errors import MergeError
from kvmem.forward import prefill
from kvmem.items import KVCacheItem
from kvmem.merge import MergeStrategy


class ConcatStrategy(MergeStrategy):
    """Header and body 1 as stored, then for each further item: the glue, prefilled in place, and its body, moved.

    The glue is the separator, behind the tokens of the body before it that are not stored (`plain`'s last word).
    """

    @abstractmethod
    def move(self, keys_BHTD: torch.Tensor, offset: int, model: PreTrainedModel) -> torch.Tensor:
        """The keys of a body that now stands `offset` tokens further on than it was built."""

    def merge(
        self, items: Sequence[KVCacheItem], separator_ids: tuple[int, ...], model: PreTrainedModel
    ) -> DynamicCache:
        if dynamic_cache.has_sliding_layers(model.config):
            raise MergeError(
                f"{type(self).name} does not cover sliding-window attention ({model.config.model_type}), whose stored "
                "blocks lack the tokens that have left the window. Use merge=Reprefill."
            )
        first = items[0].metadata.tokens
        joined = dynamic_cache.from_layers(dynamic_cache.cut(items[0].kv_cache, 0, first.body_end), model.config)
        for before, item in pairwise(items):
            tokens = item.metadata.tokens
            glue = before.metadata.tokens.rest_ids + separator_ids
            if glue:
                prefill(model, glue, joined)
            offset = joined.get_seq_length() - tokens.header_tokens
            body = [
                (self.move(keys, offset, model), values)
                for keys, values in dynamic_cache.cut(item.kv_cache, tokens.header_tokens, tokens.body_end)
            ]
            joined = dynamic_cache.from_layers(
                dynamic_cache.join([dynamic_cache.layers_of(joined), body]), model.config
            )
        return joined
