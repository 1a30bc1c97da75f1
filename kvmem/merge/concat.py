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
from kvmem.merge import windows
from kvmem.merge.base import MergeStrategy, merged_tokens
from kvmem.merge.proof import Unproven, proof_of
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
    dropped: tuple[range, ...] = ()
    """The positions that layers with a sliding window no longer hold: zeros in `layers`, unless they are recomputed."""


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

    def check(self, items: Sequence[KVCacheItem], tokens: int, model: PreTrainedModel) -> None:
        """Raises MergeError, or Unproven with the rest of the sentence, if these items can't be merged.

        tokens: how many tokens the merge has.
        """

    def merge(
        self, items: Sequence[KVCacheItem], separator_ids: tuple[int, ...], model: PreTrainedModel
    ) -> DynamicCache:
        proof_of(model, items[0].metadata.fingerprint)
        tokens = merged_tokens(items, separator_ids).token_ids
        try:
            windows.check_kinds(model.config, len(tokens))
            self.check(items, len(tokens), model)
            blocks = self._concatenate(items, separator_ids, model)
            positions = sorted({*blocks.gap_positions, *self.positions_to_recompute(blocks, model)})
            windows.check_held(model.config, blocks.dropped, positions, len(tokens))
            recompute(model, blocks.token_ids, blocks.layers, positions)
        except Unproven as reason:
            raise MergeError(f"{type(self).name} does not cover {reason}") from reason
        return dynamic_cache.from_layers(windows.within(blocks.layers, model.config), model.config, len(tokens))

    @torch.inference_mode()
    def _concatenate(
        self, items: Sequence[KVCacheItem], separator_ids: tuple[int, ...], model: PreTrainedModel
    ) -> ConcatenatedBlocks:
        first = items[0].metadata.tokens
        parts = [windows.cut(items[0].kv_cache, 0, first.body_end)]
        dropped = [windows.dropped(items[0].kv_cache, 0, first.body_end, 0)]
        offsets = [0] * first.body_end
        gap_positions: list[int] = []
        body_spans: list[tuple[int, int]] = []
        end = first.body_end
        for previous, item in pairwise(items):
            tokens = item.metadata.tokens
            gap_tokens = len(previous.metadata.tokens.rest_ids) + len(separator_ids)
            parts.append(
                [(windows.zeros(keys, gap_tokens), windows.zeros(values, gap_tokens)) for keys, values in parts[0]]
            )
            gap_positions += range(end, end + gap_tokens)
            start = end + gap_tokens
            end = start + tokens.body_end - tokens.header_tokens
            body_spans.append((start, end))
            offsets += [0] * gap_tokens + [start - tokens.header_tokens] * (end - start)
            parts.append(windows.cut(item.kv_cache, tokens.header_tokens, tokens.body_end))
            dropped.append(windows.dropped(item.kv_cache, tokens.header_tokens, tokens.body_end, start))
        layers = dynamic_cache.join(parts)
        self.shift_keys(layers, torch.tensor(offsets, device=layers[0][0].device), model)
        token_ids = merged_tokens(items, separator_ids).token_ids
        return ConcatenatedBlocks(
            token_ids, layers, tuple(gap_positions), tuple(body_spans), tuple(span for span in dropped if span)
        )
