"""Layers of a compacted memory: fewer entries than the text has tokens, and as many as each KV head needs.

What is stored is packed: the entries of all heads, one head behind the other, without padding. A view pads heads of
different lengths in memory, and a mask hides the padding. The position of what follows is the text's length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from kvmem.cache.layers import KV, Contents, CopyOnWriteLayer
from kvmem.errors import CompactionError

PACKED_KEYS, PACKED_VALUES, BIAS = "packed.k", "packed.v", "packed.bias"
"""The names of what a layer keeps: keys and values, (1, 1, entries of all heads, head_dim), and, if the strategy has
set any, what is added to the scores of each entry, (1, 1, entries of all heads, 1)."""

NO_MASK = (
    "This compacted memory needs a mask in every layer, which only kvmem's own forward pass makes. Answer with "
    "generate, stream or prefill of the backend, not with the model itself."
)


class CompactedLayer(DynamicLayer):
    """A stored layer of a compacted memory. It can't grow: a view of it can."""

    def __init__(self, kept: Mapping[str, torch.Tensor], lengths: Sequence[int], tokens: int) -> None:
        """kept: packed tensors by name. lengths: the entries of each KV head. tokens: the length of the text."""
        super().__init__()
        self.kept, self.lengths, self.tokens = dict(kept), tuple(lengths), tokens
        keys = self.kept[PACKED_KEYS]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def get_seq_length(self) -> int:
        return self.tokens

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KV:
        raise CompactionError("A stored compacted memory can't grow. Give models the view that get_cache returns.")

    def contents(self) -> Contents:
        """The packed tensors, not copied."""
        return dict(self.kept)

    def view(self) -> CompactedView:
        """A layer that starts from these entries and never writes to them. Heads of one length are not copied."""
        keys, values, bias = (self._by_head(self.kept.get(name)) for name in (PACKED_KEYS, PACKED_VALUES, BIAS))
        assert keys is not None and values is not None
        bias_HT = None if bias is None else bias[0, :, :, 0]
        longest = max(self.lengths)
        if min(self.lengths) < longest:
            if bias_HT is None:
                bias_HT = keys.new_zeros(len(self.lengths), longest)
            behind_HT = torch.arange(longest) >= torch.tensor(self.lengths)[:, None]
            bias_HT = bias_HT.masked_fill(behind_HT.to(bias_HT.device), torch.finfo(bias_HT.dtype).min)
        return CompactedView(keys, values, bias_HT, self.tokens)

    def _by_head(self, packed: torch.Tensor | None) -> torch.Tensor | None:
        """The packed entries as (1, kv_heads, longest, size); zeros behind the end of a shorter head."""
        if packed is None:
            return None
        longest, heads = max(self.lengths), len(self.lengths)
        if min(self.lengths) == longest:
            return packed.view(1, heads, longest, packed.shape[-1])
        padded = packed.new_zeros(1, heads, longest, packed.shape[-1])
        for head, entries in enumerate(packed[0, 0].split(self.lengths)):
            padded[0, head, : len(entries)] = entries
        return padded


class CompactedView(CopyOnWriteLayer):
    """A layer of a view of a compacted memory. New tokens have the positions behind the text, not behind the entries.

    bias_HT: what is added to the scores of each entry, (kv_heads, entries); None: nothing.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, bias_HT: torch.Tensor | None, tokens: int) -> None:
        super().__init__()
        self.keys, self.values, self.bias_HT, self.tokens = keys, values, bias_HT, tokens
        self.entries = keys.shape[-2]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.needs_mask = False
        """Whether the mask that a model makes by itself is not right for this layer."""
        self.has_mask = False
        """Whether the next update is followed by attention with the right mask."""

    @property
    def new_tokens(self) -> int:
        """How many tokens follow the memory."""
        assert self.keys is not None
        return self.keys.shape[-2] - self.entries

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.tokens + self.new_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.keys is None:
            return query_length, 0
        return self.keys.shape[-2] + query_length, self.tokens - self.entries

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KV:
        if self.needs_mask and not self.has_mask:
            raise CompactionError(NO_MASK)
        self.has_mask = False
        return super().update(key_states, value_states)

    def can_crop(self, tokens: int) -> bool:
        """Whether the layer can go back to so many tokens: to the end of the memory, or behind it."""
        return tokens >= self.tokens

    def crop_to(self, tokens: int) -> None:
        """Keeps the memory and the new tokens up to `tokens`, in place, without a copy."""
        assert self.keys is not None and self.values is not None
        held = self.entries + tokens - self.tokens
        self.keys, self.values = self.keys[..., :held, :], self.values[..., :held, :]

    def reset(self) -> None:
        self.bias_HT, self.entries, self.tokens, self.needs_mask = None, 0, 0, False
        super().reset()

    def mask(self, new: int, heads: int) -> torch.Tensor:
        """What is added to the scores of `new` tokens that follow, by query head, (1, heads, new, held + new).

        The lowest value of the dtype hides padding, and the tokens behind each.
        """
        assert self.keys is not None
        lowest = torch.finfo(self.keys.dtype).min
        bias_HT = self.bias_HT
        if bias_HT is None:
            bias_HT = self.keys.new_zeros(self.keys.shape[1], self.entries)
        memory_QNT = bias_HT.repeat_interleave(heads // len(bias_HT), dim=0)[:, None].expand(-1, new, -1)
        held = self.new_tokens
        causal_NS = self.keys.new_full((new, held + new), lowest).triu(held + 1)
        return torch.cat([memory_QNT, causal_NS.expand(heads, -1, -1)], dim=-1)[None]


def packed(heads: Sequence[Mapping[str, torch.Tensor]]) -> tuple[Contents, tuple[int, ...]]:
    """The contents of a layer, and the entries of each head, from what each head keeps, (entries, size) by name.

    A head without a bias among heads with one gets zeros.
    """
    lengths = tuple(len(head[PACKED_KEYS]) for head in heads)
    kept = {
        name: torch.cat([head[name] for head in heads])[None, None].contiguous()
        for name in (PACKED_KEYS, PACKED_VALUES)
    }
    if any(BIAS in head for head in heads):
        parts = [
            head[BIAS] if BIAS in head else head[PACKED_KEYS].new_zeros(len(head[PACKED_KEYS]), 1) for head in heads
        ]
        kept[BIAS] = torch.cat(parts)[None, None].contiguous()
    return kept, lengths
