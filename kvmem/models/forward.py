"""The two steps of generation, prefill and decode, as functions of a Hugging Face model and a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from kvmem.cache import dynamic_cache
from kvmem.models.probes import continues_in_one_step
from kvmem.models.single_pass import single_pass


def prefill(model: PreTrainedModel, token_ids: Sequence[int], cache: DynamicCache) -> torch.Tensor:
    """Appends `token_ids` to `cache` and returns the logits of the last token, (vocab,).

    In one forward pass; in one for each token where the model would not read the states that the cache holds.
    """
    continued = len(token_ids) > 1 and dynamic_cache.has_state_layers(cache) and cache.get_seq_length() > 0
    if continued and not continues_in_one_step(model):
        for token_id in token_ids[:-1]:
            single_pass(model, (token_id,), cache)
        token_ids = token_ids[-1:]
    return single_pass(model, token_ids, cache)


def decode_one_token(model: PreTrainedModel, token_id: int, cache: DynamicCache) -> torch.Tensor:
    """Appends one token to `cache` and returns its logits, (vocab,)."""
    return single_pass(model, (token_id,), cache)
