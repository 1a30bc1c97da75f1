"""The two steps of generation, prefill and decode, as functions of a Hugging Face model and a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel


@torch.inference_mode()
def prefill(model: PreTrainedModel, token_ids: Sequence[int], cache: DynamicCache) -> torch.Tensor:
    """Appends `token_ids` to `cache` and returns the logits of the last token, (vocab,)."""
    ids_BT = torch.tensor([token_ids], device=model.device)
    logits_BTV: torch.Tensor = model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits_BTV[0, -1]


def decode_one_token(model: PreTrainedModel, token_id: int, cache: DynamicCache) -> torch.Tensor:
    """Appends one token to `cache` and returns its logits, (vocab,)."""
    return prefill(model, (token_id,), cache)
