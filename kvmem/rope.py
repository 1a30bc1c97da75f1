"""Rotates cached keys to another position: K' = R(Δ) K. Pure.

Rotary embeddings turn each pair of key dimensions by an angle proportional to the position (Su et al. 2021, RoFormer,
section 3.2), so a key cached at position p becomes the key at p + Δ by one more turn of Δ.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kvmem.errors import MergeError

# These scale frequencies once and for all; "dynamic" and "longrope" change them with the length of the text.
FIXED_FREQUENCIES = {"default", "linear", "llama3", "yarn"}
# Families that rotate halves of each whole head (the "neox" layout), as `rotate` does.
HALF_ROTATION = {"llama", "mistral", "qwen2", "qwen3"}


def check_rotatable(config: PreTrainedConfig, strategy: str) -> None:
    """Raises MergeError, by name, for a model whose keys `rotate` does not move rightly."""
    if config.model_type not in HALF_ROTATION:  # asked first: another family may have no rotary embeddings at all
        raise MergeError(
            f"{strategy} does not cover {config.model_type}; it covers {', '.join(sorted(HALF_ROTATION))}. "
            "Use merge=Reprefill."
        )
    rope_type = config.rope_parameters.get("rope_type", "default")
    if rope_type not in FIXED_FREQUENCIES:
        raise MergeError(
            f"{strategy} does not cover rope_type={rope_type}, whose frequencies change with the length of the text; "
            f"it covers {', '.join(sorted(FIXED_FREQUENCIES))}. Use merge=Reprefill."
        )


def inverse_frequencies(model: PreTrainedModel) -> torch.Tensor:
    """Angles a position, (head_dim / 2,), fp32, as the model itself uses them (scaling included)."""
    return model.get_decoder().rotary_emb.inv_freq.float()


def rotate(keys_BHTD: torch.Tensor, offset: int, inverse_frequencies_F: torch.Tensor) -> torch.Tensor:
    """Keys (batch, kv_heads, tokens, head_dim) moved `offset` positions on, in fp32, and returned in their dtype."""
    if offset == 0:
        return keys_BHTD
    angles_F = offset * inverse_frequencies_F.double()
    cos_F, sin_F = angles_F.cos().float(), angles_F.sin().float()
    first, second = keys_BHTD.float().chunk(2, dim=-1)
    return torch.cat([first * cos_F - second * sin_F, second * cos_F + first * sin_F], dim=-1).to(keys_BHTD.dtype)
