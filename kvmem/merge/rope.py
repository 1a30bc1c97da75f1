"""Rotates cached keys to another position: K' = R(Δ) K.

Rotary embeddings turn each pair of key dimensions by an angle proportional to the position (Su et al. 2021, RoFormer,
section 3.2), so a key cached at position p becomes the key at p + Δ by one more turn of Δ.
"""

from __future__ import annotations

from typing import NamedTuple

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


class Turn(NamedTuple):
    """cos and sin of the angles by which each token's key is turned, (tokens, head_dim / 2), fp32."""

    cos_TF: torch.Tensor
    sin_TF: torch.Tensor

    @classmethod
    def by(cls, offsets_T: torch.Tensor, inverse_frequencies_F: torch.Tensor) -> Turn:
        """Of tokens that move on by so many positions each, (tokens,) int64."""
        angles_TF = offsets_T.double()[:, None] * inverse_frequencies_F.double()
        return cls(angles_TF.cos().float(), angles_TF.sin().float())


def rotate(keys_BHTD: torch.Tensor, turn: Turn) -> None:
    """Turns keys (batch, kv_heads, tokens, head_dim) in place, computed in fp32; those that move by 0 keep their bits.

    Few and large operations: on a GPU what rotating costs is launches.
    """
    cos_TF, sin_TF = turn
    first, second = keys_BHTD.float().chunk(2, dim=-1)
    turned = (first * cos_TF).addcmul_(second, sin_TF, value=-1), (second * cos_TF).addcmul_(first, sin_TF)
    for half, values in zip(keys_BHTD.chunk(2, dim=-1), turned, strict=True):
        half.copy_(values)
