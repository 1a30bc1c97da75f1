"""What the strategies that put stored blocks one behind the other share."""

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
class Concatenated:
    """Blocks one behind the other: `layers` are of `token_ids`, and may be written to.

    glue: where tokens stand that no block holds. bodies: first and last + 1 of each block behind the first.
    """

    token_ids: tuple[int, ...]
    layers: list[KV]
    glue: tuple[int, ...]
    bodies: tuple[tuple[int, int], ...]


class ConcatStrategy(MergeStrategy):
    """Header and body 1 as stored, then for each further item the glue, computed in place, and its body, moved.

    The glue is the separator, behind the tokens of the body before it that are not stored (`plain`'s last word). All
    of it takes one forward pass.
    """

    @abstractmethod
    def move(self, layers: Sequence[KV], offsets_T: torch.Tensor, model: PreTrainedModel) -> None:
        """Brings the keys of the joined blocks, in place, to where they now stand: each token `offsets` positions,
        (tokens,) int64, further on than it was built."""

    def chosen(self, blocks: Concatenated, model: PreTrainedModel) -> Sequence[int]:
        """Which tokens of the bodies behind the first are computed anew, beside the glue."""
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
        blocks = self._concatenated(items, separator_ids, model)
        recompute(model, blocks.token_ids, blocks.layers, sorted({*blocks.glue, *self.chosen(blocks, model)}))
        return dynamic_cache.from_layers(blocks.layers, model.config)

    @torch.inference_mode()
    def _concatenated(
        self, items: Sequence[KVCacheItem], separator_ids: tuple[int, ...], model: PreTrainedModel
    ) -> Concatenated:
        first = items[0].metadata.tokens
        parts = [dynamic_cache.cut(items[0].kv_cache, 0, first.body_end)]
        offsets = [0] * first.body_end
        glue: list[int] = []
        bodies: list[tuple[int, int]] = []
        end = first.body_end
        for before, item in pairwise(items):
            tokens = item.metadata.tokens
            between = len(before.metadata.tokens.rest_ids) + len(separator_ids)
            parts.append([(room := _room(parts[0][0][0], between), room)] * len(parts[0]))
            glue += range(end, end + between)
            start = end + between
            end = start + tokens.body_end - tokens.header_tokens
            bodies.append((start, end))
            offsets += [0] * between + [start - tokens.header_tokens] * (end - start)
            parts.append(dynamic_cache.cut(item.kv_cache, tokens.header_tokens, tokens.body_end))
        layers = dynamic_cache.join(parts)
        self.move(layers, torch.tensor(offsets, device=layers[0][0].device), model)
        return Concatenated(merged_tokens(items, separator_ids).token_ids, layers, tuple(glue), tuple(bodies))


def _room(like_BHTD: torch.Tensor, tokens: int) -> torch.Tensor:
    batch, heads, _, head_dim = like_BHTD.shape
    return like_BHTD.new_zeros(batch, heads, tokens, head_dim)
