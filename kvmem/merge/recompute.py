"""Recomputes single tokens of a cache in place, each attending to everything before it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvmem.cache import KV, dynamic_cache
from kvmem.errors import MergeError

MASKS = ("sdpa", "eager")
"""The attention implementations of transformers that accept an arbitrary mask."""


@torch.inference_mode()
def recompute(model: PreTrainedModel, token_ids: Sequence[int], layers: Sequence[KV], positions: Sequence[int]) -> None:
    """Overwrites the keys and values at `positions` in `layers` by one forward pass over those tokens.

    layers: keys and values of all `token_ids`, each (1, kv_heads, tokens, head_dim), for all of the model's layers or
    only the first ones. Supports full attention. Raises MergeError if the model's attention accepts no mask.
    """
    if not positions:
        return
    implementation = model.config._attn_implementation
    if implementation not in MASKS:
        raise MergeError(
            f"This merge recomputes single tokens, for which attn_implementation={implementation} has no mask. Open "
            f"the model with {' or '.join(MASKS)}, or use merge=Reprefill."
        )
    at_S = torch.tensor(sorted(positions), device=model.device)
    future_ST = torch.arange(len(token_ids), device=model.device) > at_S[:, None]
    mask_ST = torch.zeros(future_ST.shape, dtype=model.dtype, device=model.device)
    mask_ST.masked_fill_(future_ST, torch.finfo(model.dtype).min)
    cache = dynamic_cache.patched(layers, at_S)
    ids_1S = torch.tensor([token_ids], device=model.device)[:, at_S]
    decoder = _first_layers(model.get_decoder(), len(layers))
    arguments = {"position_ids": at_S[None], "attention_mask": mask_ST[None, None]}
    try:
        decoder(input_ids=ids_1S, past_key_values=cache, use_cache=True, **arguments)
    except (TypeError, ValueError) as error:  # foreign code: ALiBi's bias is made from a mask of another shape
        raise MergeError(
            f"This merge recomputes single tokens, and {model.config.model_type} takes no mask for them ({error}). "
            "Use merge=Reprefill."
        ) from error


def _first_layers(decoder: Any, count: int) -> Any:
    """The same decoder, sharing its modules, that ends after `count` layers.

    A shortened decoder needs the attribute `layers`, which not every model family has; the whole decoder does not.
    """
    if count == decoder.config.num_hidden_layers:
        return decoder
    shortened = copy.copy(decoder)
    shortened._modules = dict(decoder._modules)
    shortened.layers = nn.ModuleList(list(decoder.layers)[:count])
    return shortened
