"""Faults of the engine's own forward pass, which noise measured by the same code would excuse."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from kvmem.engines.huggingface import backend as hf
from tests.mutations.mutation import Mutation, Patch

KIND = "noise that excuses"
EXPECTED = "a logit|stored KV|timed"


@torch.inference_mode()
def _forward(model: Any, token_ids: Any, cache: DynamicCache, **more: Any) -> torch.Tensor:
    ids = torch.tensor([token_ids], device=model.device)
    logits: torch.Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **more).logits
    return logits[0, -1]


def _behind_a_cache(off: int, original: Any) -> Any:
    def prefill(model: Any, token_ids: Any, cache: DynamicCache) -> torch.Tensor:
        held = cache.get_seq_length()
        if not held:
            return original(model, token_ids, cache)  # type: ignore[no-any-return]
        positions = torch.arange(held + off, held + off + len(token_ids), device=model.device)[None]
        return _forward(model, token_ids, cache, position_ids=positions)

    return prefill


def _positions_doubled(original: Any) -> Any:
    def prefill(model: Any, token_ids: Any, cache: DynamicCache) -> torch.Tensor:
        held = cache.get_seq_length()
        positions = 2 * torch.arange(held, held + len(token_ids), device=model.device)[None]
        return _forward(model, token_ids, cache, position_ids=positions)

    return prefill


def _autocast(original: Any) -> Any:
    def prefill(model: Any, token_ids: Any, cache: DynamicCache) -> torch.Tensor:
        with torch.autocast(model.device.type, torch.bfloat16):
            return original(model, token_ids, cache).float()  # type: ignore[no-any-return]

    return prefill


def _logits_scaled(original: Any) -> Any:
    return lambda model, token_ids, cache: 1.001 * original(model, token_ids, cache)


def _first_token_masked(original: Any) -> Any:
    def prefill(model: Any, token_ids: Any, cache: DynamicCache) -> torch.Tensor:
        mask = torch.ones(1, cache.get_seq_length() + len(token_ids), dtype=torch.long, device=model.device)
        mask[0, 0] = 0
        positions = torch.arange(cache.get_seq_length(), mask.shape[1], device=model.device)[None]
        return _forward(model, token_ids, cache, attention_mask=mask, position_ids=positions)

    return prefill


MUTATIONS = [
    Mutation(KIND, name, EXPECTED, (Patch(hf, "prefill", make),))
    for name, make in (
        ("positions behind a cache are 1 off", partial(_behind_a_cache, 1)),
        ("positions behind a cache are 7 off", partial(_behind_a_cache, 7)),
        ("positions are doubled in every prefill", _positions_doubled),
        ("every prefill computes in bfloat16", _autocast),
        ("every logit is 0.1% too large", _logits_scaled),
        ("no prefill attends to the first token", _first_token_masked),
    )
]
