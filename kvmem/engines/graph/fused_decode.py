"""Our own Triton kernels, where Triton runs: writing heads to a buffer, and a decoding step.

A decoding step mostly reads every weight once. So the operations around a matrix product (normalization, gating, adding
to the residual stream) are part of the product's kernel: seven launches for each layer instead of fourteen.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch

from kvmem.engines.graph.attention import attend

if TYPE_CHECKING:
    from kvmem.engines.graph.families import Family
    from kvmem.engines.graph.layer_types import LayerShape, Where
    from kvmem.engines.graph.weights import LayerWeights


def why_not(device: torch.device, family: Family) -> str | None:
    """The reason why these kernels can't be used here, or for this family; None if they can."""
    if device.type != "cuda" or torch.version.hip:
        return "needs an NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton"
    if family.post_norms:
        return "covers norms before attention and MLP, not behind them as in this model"
    return None


# A custom operator, so that a compiled layer calls the kernel unchanged and writes to the buffer in place.
@torch.library.custom_op("kvmem::place_heads", mutates_args=("k", "v"))
def place_heads(
    qkv: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    at: torch.Tensor,
    heads: int,
) -> torch.Tensor:
    """`place_heads` of `triton_kernels` as a custom operator: writes a token's keys and values, returns its queries."""
    from kvmem.engines.graph import triton_kernels

    return triton_kernels.place_heads(qkv, q_norm, k_norm, eps, cos, sin, k, v, at, heads)


@place_heads.register_fake
def _(
    qkv: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    at: torch.Tensor,
    heads: int,
) -> torch.Tensor:
    return qkv.new_empty((1, qkv.shape[1], heads, k.shape[3]))


def layer_of_one_token(
    x_C: torch.Tensor, k_1KTD: torch.Tensor, v_1KTD: torch.Tensor, where: Where, w: LayerWeights, shape: LayerShape
) -> torch.Tensor:
    """The residual stream, (hidden,), after a decoder layer; see `layers.layer`."""
    from kvmem.engines.graph import triton_kernels

    product = triton_kernels.product
    qkv_X = product(x_C, w.qkv, norm_C=w.input_norm, eps=shape.eps, bias_R=w.qkv_bias)
    turn, at_1 = (where.cos_1S1D, where.sin_1S1D), where.at_S
    qkv_11X = qkv_X[None, None]
    q = triton_kernels.place_heads(qkv_11X, w.q_norm, w.k_norm, shape.eps, *turn, k_1KTD, v_1KTD, at_1, shape.heads)
    gathered = attend(q, k_1KTD, v_1KTD, where.length_1, True, shape.kernel, where.plan, shape.scale)
    if shape.residual != 1.0:  # added outside of the product's kernel, which has no factor
        x_C = x_C + product(gathered.flatten(), w.out, bias_R=w.out_bias) * shape.residual
        inner_I = product(x_C, w.gate_up, norm_C=w.mlp_norm, eps=shape.eps, bias_R=w.gate_up_bias, gated=True)
        return x_C + product(inner_I, w.down, bias_R=w.down_bias) * shape.residual
    x_C = product(gathered.flatten(), w.out, bias_R=w.out_bias, added_R=x_C)
    inner_I = product(x_C, w.gate_up, norm_C=w.mlp_norm, eps=shape.eps, bias_R=w.gate_up_bias, gated=True)
    return product(inner_I, w.down, bias_R=w.down_bias, added_R=x_C)


def next_logits(x_C: torch.Tensor, norm_C: torch.Tensor, eps: float, head_VC: torch.Tensor) -> torch.Tensor:
    """The logits, (vocab,), of the last layer's residual stream."""
    from kvmem.engines.graph import triton_kernels

    return triton_kernels.product(x_C, head_VC, norm_C=norm_C, eps=eps)
