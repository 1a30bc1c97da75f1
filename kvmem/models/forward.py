"""The two steps of every answer, as pure functions over a Hugging Face model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel


@torch.inference_mode()
def prefill(model: PreTrainedModel, token_ids: Sequence[int], cache: DynamicCache) -> torch.Tensor:
    """Computes `token_ids` behind what `cache` holds, which grows by them. Gives the last token's logits, (vocab,)."""
    ids_BT = torch.tensor([token_ids], device=model.device)
    return model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]


def decode_one_token(model: PreTrainedModel, token_id: int, cache: DynamicCache) -> torch.Tensor:
    """One step of decoding: the logits, (vocab,), that follow `token_id`."""
    return prefill(model, (token_id,), cache)
