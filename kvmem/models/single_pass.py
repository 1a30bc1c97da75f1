"""One forward pass of a Hugging Face model over tokens that follow a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from kvmem.cache import dynamic_cache
from kvmem.models.compacted_attention import with_masks


@torch.inference_mode()
def single_pass(model: PreTrainedModel, token_ids: Sequence[int], cache: DynamicCache) -> torch.Tensor:
    """Appends `token_ids` to `cache` in one forward pass and returns the logits of the last token, (vocab,)."""
    ids_BT = torch.tensor([token_ids], device=model.device)
    arguments = {}
    if dynamic_cache.has_state_layers(cache):  # some of these models (Bamba) count positions from 0 in every pass
        start = cache.get_seq_length()
        arguments["position_ids"] = torch.arange(start, start + len(token_ids), device=model.device)[None]
    with with_masks(model, cache, len(token_ids)):
        logits_BTV: torch.Tensor = model(
            input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1, **arguments
        ).logits
    return logits_BTV[0, -1]
