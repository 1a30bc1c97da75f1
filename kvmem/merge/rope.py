"""Rotates cached keys to another position: K' = R(Δ) K.

Rotary embeddings rotate each pair of key dimensions by an angle proportional to the position (Su et al. 2021, RoFormer,
section 3.2). One more rotation by Δ turns the key cached at position p into the key at p + Δ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kvmem.errors import MergeError

FIXED_FREQUENCIES = {"default", "linear", "llama3", "yarn"}
"""RoPE types with constant frequencies. Those of "dynamic" and "longrope" change with the length of the text."""
HALF_ROTATION = {"llama", "mistral", "qwen2", "qwen3"}
"""Model families that rotate the two halves of each whole head (the "neox" layout), as `rotate` does."""


def check_rotatable(config: PreTrainedConfig, strategy: str) -> None:
    """Raises MergeError, with the name of the `strategy`, for a model whose keys `rotate` can't shift."""
    if config.model_type not in HALF_ROTATION:  # checked first, because other families may have no rotary embeddings
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
    """The rotation in radians per position, (head_dim / 2,), fp32, as the model uses it (scaling included)."""
    frequencies_F: torch.Tensor = model.get_decoder().rotary_emb.inv_freq
    return frequencies_F.float()


class Rotation(NamedTuple):
    """cos and sin of the angles by which each token's key is rotated, (tokens, head_dim / 2), fp32."""

    cos_TF: torch.Tensor
    sin_TF: torch.Tensor

    @classmethod
    def by(cls, offsets_T: torch.Tensor, inverse_frequencies_F: torch.Tensor) -> Rotation:
        """The rotation that shifts each token by its offset in positions, (tokens,) int64."""
        angles_TF = offsets_T.double()[:, None] * inverse_frequencies_F.double()
        return cls(angles_TF.cos().float(), angles_TF.sin().float())


def rotate(keys_BHTD: torch.Tensor, rotation: Rotation) -> None:
    """Rotates keys (batch, kv_heads, tokens, head_dim) in place, computed in fp32. Keys with offset 0 keep their bits.

    Uses few and large operations, because on a GPU the cost is that of the kernel launches.
    """
    cos_TF, sin_TF = rotation
    first, second = keys_BHTD.float().chunk(2, dim=-1)
    rotated = (first * cos_TF).addcmul_(second, sin_TF, value=-1), (second * cos_TF).addcmul_(first, sin_TF)
    for half, values in zip(keys_BHTD.chunk(2, dim=-1), rotated, strict=True):
        half.copy_(values)
