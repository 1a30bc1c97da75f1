"""Chosen tokens of a cache computed anew, in place: each sees all that lies before it as it now is."""

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
"""The attention implementations of transformers that take a mask of any form."""


@torch.inference_mode()
def recompute(model: PreTrainedModel, token_ids: Sequence[int], layers: Sequence[KV], at: Sequence[int]) -> None:
    """Overwrites the keys and values of the tokens `at`, in all of `layers`, by one forward pass over those tokens.

    layers: the cache of `token_ids`, (1, kv_heads, tokens, head_dim) each; of the model's first layers as many as are
    given. Covers full attention. Raises MergeError where the model's attention takes no mask.
    """
    if not at:
        return
    implementation = model.config._attn_implementation
    if implementation not in MASKS:
        raise MergeError(
            f"This merge computes single tokens anew, for which attn_implementation={implementation} has no mask. Open "
            f"the model with {' or '.join(MASKS)}, or use merge=Reprefill."
        )
    at_S = torch.tensor(sorted(at), device=model.device)
    unseen_ST = torch.arange(len(token_ids), device=model.device) > at_S[:, None]
    mask_ST = torch.zeros(unseen_ST.shape, dtype=model.dtype, device=model.device)
    mask_ST.masked_fill_(unseen_ST, torch.finfo(model.dtype).min)
    cache = dynamic_cache.patched(layers, at_S)
    ids_1S = torch.tensor([token_ids], device=model.device)[:, at_S]
    decoder = _first_layers(model.get_decoder(), len(layers))
    where = {"position_ids": at_S[None], "attention_mask": mask_ST[None, None]}
    decoder(input_ids=ids_1S, past_key_values=cache, use_cache=True, **where)


def _first_layers(decoder: Any, count: int) -> Any:
    """The same decoder, ending after `count` layers; its modules are shared. Only a part asks how it calls its layers,
    for which families have names of their own."""
    if count == decoder.config.num_hidden_layers:
        return decoder
    shortened = copy.copy(decoder)
    shortened._modules = dict(decoder._modules)
    shortened.layers = nn.ModuleList(list(decoder.layers)[:count])
    return shortened
