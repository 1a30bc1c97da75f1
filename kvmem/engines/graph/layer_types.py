"""What a decoder layer is given besides its weights and its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class LayerShape:
    """What of a layer is not in its weights. `kernel` names the attention kernel; fused: see `fused.py`."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    kernel: str
    fused: bool = False

    @classmethod
    def of(cls, config: PreTrainedConfig, kernel: str, fused: bool = False) -> LayerShape:
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(heads, config.num_key_value_heads or heads, head_dim, config.rms_norm_eps, kernel, fused)


class Where(NamedTuple):
    """Where the new tokens of one sequence lie: the same for all layers."""

    cos_1S1D: torch.Tensor
    sin_1S1D: torch.Tensor
    at_S: torch.Tensor
    """Their rows in the buffer, int64."""
    length_1: torch.Tensor
    """How many rows hold tokens, they included, int32."""
    plan: torch.Tensor | None
    """The attention kernel's (`Attention.plan`)."""
