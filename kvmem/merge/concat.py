"""The base of the strategies that concatenate stored blocks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers import DynamicCache, PreTrainedModel

from kvmem.cache import KV, KVCacheItem, dynamic_cache
from kvmem.errors import MergeError
from kvmem.merge.base import MergeStrategy, merged_tokens
from kvmem.merge.recompute import recompute


@dataclass(frozen=True)
class ConcatenatedBlocks:
    """Stored blocks, concatenated and shifted to their new positions."""

    token_ids: tuple[int, ...]
    layers: list[KV]
    """Keys and values of `token_ids`, each (1, kv_heads, tokens, head_dim). They may be overwritten."""
    gap_positions: tuple[int, ...]
    """Positions of the tokens that no block holds, such as separators. They are always recomputed."""
    body_spans: tuple[tuple[int, int], ...]
    """(start, end) of each block after the first, end exclusive."""


class ConcatStrategy(MergeStrategy):
    """Concatenates the first item's header and body with the bodies of the other items, and recomputes the gaps.

    The gap between two bodies consists of the tokens of the earlier memory that are not stored (the last word, under
    the template `plain`) and the separator. One forward pass computes all gaps in place.
    """

    @abstractmethod
    def shift_keys(self, layers: Sequence[KV], offsets_T: torch.Tensor, model: PreTrainedModel) -> None:
        """Shifts the keys of the concatenated blocks, in place.

        offsets_T: for each token how many positions after its original position it is now, (tokens,) int64.
        """

    def positions_to_recompute(self, blocks: ConcatenatedBlocks, model: PreTrainedModel) -> Sequence[int]:
        """The positions in the bodies after the first that are recomputed with the gaps. None by default."""
        return ()

    def merge(
        self, items: Sequence[KVCacheItem], separator_ids: tuple[int, ...], model: PreTrainedModel
    ) -> DynamicCache:
        if dynamic_cache.has_sliding_layers(model.config):
            raise MergeError(
                f"{type(self).name} does not cover sliding-window attention ({model.config.model_type}), whose stored "
                "blocks lack the tokens that have left the window. Use merge=Reprefill."
            )
        if len(items) == 1:
            body_end = items[0].metadata.tokens.body_end
            return dynamic_cache.from_layers(dynamic_cache.cut(items[0].kv_cache, 0, body_end), model.config)
        blocks = self._concatenate(items, separator_ids, model)
        positions = sorted({*blocks.gap_positions, *self.positions_to_recompute(blocks, model)})
        recompute(model, blocks.token_ids, blocks.layers, positions)
        return dynamic_cache.from_layers(blocks.layers, model.config)

    @torch.inference_mode()
    def _concatenate(
        self, items: Sequence[KVCacheItem], separator_ids: tuple[int, ...], model: PreTrainedModel
    ) -> ConcatenatedBlocks:
        first = items[0].metadata.tokens
        parts = [dynamic_cache.cut(items[0].kv_cache, 0, first.body_end)]
        offsets = [0] * first.body_end
        gap_positions: list[int] = []
        body_spans: list[tuple[int, int]] = []
        end = first.body_end
        for previous, item in pairwise(items):
            tokens = item.metadata.tokens
            gap_tokens = len(previous.metadata.tokens.rest_ids) + len(separator_ids)
            keys_BHTD, values_BHTD = parts[0][0]
            parts.append([(_zeros(keys_BHTD, gap_tokens), _zeros(values_BHTD, gap_tokens))] * len(parts[0]))
            gap_positions += range(end, end + gap_tokens)
            start = end + gap_tokens
            end = start + tokens.body_end - tokens.header_tokens
            body_spans.append((start, end))
            offsets += [0] * gap_tokens + [start - tokens.header_tokens] * (end - start)
            parts.append(dynamic_cache.cut(item.kv_cache, tokens.header_tokens, tokens.body_end))
        layers = dynamic_cache.join(parts)
        self.shift_keys(layers, torch.tensor(offsets, device=layers[0][0].device), model)
        token_ids = merged_tokens(items, separator_ids).token_ids
        return ConcatenatedBlocks(token_ids, layers, tuple(gap_positions), tuple(body_spans))


def _zeros(like_BHTD: torch.Tensor, tokens: int) -> torch.Tensor:
    batch, heads, _, head_dim = like_BHTD.shape
    return like_BHTD.new_zeros(batch, heads, tokens, head_dim)
