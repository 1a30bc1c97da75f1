"""Recomputes single tokens of a cache in place, each attending to everything before it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from kvmem.cache import KV
from kvmem.errors import MergeError
from kvmem.merge.proof import proof_of

MASKS = ("sdpa", "eager")
"""The attention implementations of transformers that accept an arbitrary mask."""


def recompute(model: PreTrainedModel, token_ids: Sequence[int], layers: Sequence[KV], positions: Sequence[int]) -> None:
    """Overwrites the keys and values at `positions` in `layers`, by the model's own decoder layers.

    layers: keys and values of all `token_ids`, each (1, kv_heads, tokens, head_dim), for all of the model's layers or
    only the first ones. Layers with a sliding window read only tokens within it. Raises MergeError for a model whose
    attention accepts no mask, or of which a probe that is recomputed like this is not what one pass over it gives.
    """
    if not positions:
        return
    implementation = model.config._attn_implementation
    if implementation not in MASKS:
        raise MergeError(
            f"This merge recomputes single tokens, for which attn_implementation={implementation} has no mask. Open "
            f"the model with {' or '.join(MASKS)}, or use merge=Reprefill."
        )
    proof_of(model).recomputing(model, len(token_ids))(model, token_ids, layers, sorted(set(positions)))
