"""Merges of memories whose layers have a sliding window: what such layers hold, and what a merge needs of it.

A layer with a window of W tokens keeps the last W - 1 of a memory. A token of a merge that is computed, and the query
behind it, attend to the W - 1 tokens before them on such a layer. The merge is right if all of these are held.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedConfig

from kvmem.cache import KV, dynamic_cache
from kvmem.merge.proof import Unproven


def cut(cache: DynamicCache, start: int, end: int) -> list[KV]:
    """As `dynamic_cache.cut`, with zeros for the tokens that left a window."""
    tokens = cache.get_seq_length()
    return [
        (_cut(keys, tokens, start, end), _cut(values, tokens, start, end))
        for keys, values in dynamic_cache.layers_of(cache)
    ]


def dropped(cache: DynamicCache, start: int, end: int, at: int) -> range:
    """Which of the tokens `start` to `end` left a window, as positions of a merge in which `start` is `at`."""
    held = min(keys.shape[-2] for keys, _ in dynamic_cache.layers_of(cache))
    return range(at, at + max(0, min(end, cache.get_seq_length() - held) - start))


def check_kinds(config: PreTrainedConfig, tokens: int) -> None:
    """Raises Unproven for a merge that is longer than the chunks of a model whose attention is in chunks."""
    text = config.get_text_config(decoder=True)
    chunk = getattr(text, "attention_chunk_size", None)
    if chunk and tokens > chunk and "chunked_attention" in (getattr(text, "layer_types", None) or ()):
        raise Unproven(
            f"{config.model_type}: its layers attend in chunks of {chunk} tokens, and a block that is moved falls into "
            "other chunks. Use merge=Reprefill."
        )


def check_held(config: PreTrainedConfig, dropped: Sequence[range], recomputed: Sequence[int], tokens: int) -> None:
    """Raises Unproven if a recomputed token, or one behind the merge, attends to one that left a window."""
    if not dropped:
        return
    missing_T = torch.zeros(tokens, dtype=torch.bool)
    for span in dropped:
        missing_T[span.start : span.stop] = True
    missing_T[list(recomputed)] = False
    for window in {window for window in dynamic_cache.windows_of(config) if window is not None}:
        for position in (*recomputed, tokens):
            before = missing_T[max(0, position - window + 1) : position]
            if bool(before.any()):
                first = position - len(before) + int(before.nonzero()[0])
                raise Unproven(
                    f"{config.model_type} with these memories: token {position} of the merge attends to token {first} "
                    f"in layers with a sliding window of {window} tokens, which dropped it when its memory was built. "
                    "Merge memories that are shorter than the window, or use merge=Reprefill."
                )


def within(layers: Sequence[KV], config: PreTrainedConfig) -> list[KV]:
    """What each layer keeps of a merge: those with a window, the last tokens."""
    return [
        (keys, values) if window is None else (keys[..., 1 - window :, :], values[..., 1 - window :, :])
        for (keys, values), window in zip(layers, dynamic_cache.windows_of(config), strict=True)
    ]


def zeros(like_BHTD: torch.Tensor, tokens: int) -> torch.Tensor:
    """A block of `tokens` tokens of zeros, (batch, heads, tokens, head_dim)."""
    batch, heads, _, head_dim = like_BHTD.shape
    return like_BHTD.new_zeros(batch, heads, tokens, head_dim)


def _cut(tensor_BHTD: torch.Tensor, tokens: int, start: int, end: int) -> torch.Tensor:
    gone = tokens - tensor_BHTD.shape[-2]
    held = tensor_BHTD[..., max(0, start - gone) : max(0, end - gone), :]
    lacking = end - start - held.shape[-2]
    return torch.cat([zeros(tensor_BHTD, lacking), held], dim=-2) if lacking else held
