"""What a decoder layer takes besides its weights and its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from kvmem.engines.graph.families import Family


@dataclass(frozen=True)
class LayerShape:
    """The sizes of a layer, equal for all of a model. kernel: the attention kernel's name. fused: uses the kernels of
    `fused_decode`."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    kernel: str
    fused: bool = False
    norms_all_heads: bool = False
    """The norms of queries and keys are over all heads together; otherwise over each."""
    scale: float | None = None
    """The factor of attention scores; None: 1 / sqrt(head_dim)."""
    residual: float = 1.0
    """The factor of what attention and MLP add to the residual stream."""

    @classmethod
    def of(cls, config: PreTrainedConfig, family: Family, kernel: str, fused: bool = False) -> LayerShape:
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            heads,
            config.num_key_value_heads or heads,
            head_dim,
            config.rms_norm_eps,
            kernel,
            fused,
            family.norms_all_heads,
            config.attention_multiplier if family.multipliers else None,
            config.residual_multiplier if family.multipliers else 1.0,
        )


class Where(NamedTuple):
    """The positions and rows of the new tokens of one sequence: the same for all layers."""

    cos_1S1D: torch.Tensor
    sin_1S1D: torch.Tensor
    at_S: torch.Tensor
    """Rows of the new tokens in the buffer, int64."""
    length_1: torch.Tensor
    """Number of rows that hold tokens, including the new ones, int32."""
    plan: torch.Tensor | None
    """The attention kernel's plan (`Attention.plan`)."""
