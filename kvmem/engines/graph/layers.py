"""A decoder layer as functions that are pure except for the rows they write. Compiled, it takes few kernels.

Dimensions: B batch, S new tokens, T rows of a buffer, H query heads, K key heads, D head size, C hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kvmem.engines.graph.attention import attend, attend_lse
from kvmem.engines.graph.fused_decode import place_heads
from kvmem.engines.graph.layer_types import LayerShape, Where
from kvmem.engines.graph.weights import LayerWeights


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root mean square normalisation over the last dimension, in fp32 (Zhang & Sennrich 2019)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotate(x_BSHD: torch.Tensor, cos_BS1D: torch.Tensor, sin_BS1D: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of each head at its token's position; element i is paired with i + head_dim / 2."""
    first, second = x_BSHD.chunk(2, dim=-1)
    return x_BSHD * cos_BS1D + torch.cat([-second, first], dim=-1) * sin_BS1D


def normed(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """`rms_norm`, or `x` itself where the family has no norm (None)."""
    return x if weight is None else rms_norm(x, weight, eps)


def qkv_products(x_BSC: torch.Tensor, w: LayerWeights, shape: LayerShape) -> torch.Tensor:
    """Queries, keys and values, concatenated: (B, S, (H + 2 K) D)."""
    return F.linear(normed(x_BSC, w.input_norm, shape.eps), w.qkv, w.qkv_bias)


def queries_keys_values(
    qkv_BSX: torch.Tensor, cos_BS1D: torch.Tensor, sin_BS1D: torch.Tensor, w: LayerWeights, shape: LayerShape
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (B, S, H, D), keys and values (B, S, K, D); queries and keys with rotary embedding."""
    batch, new, _ = qkv_BSX.shape
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    parts = list(qkv_BSX.split([n * shape.head_dim for n in heads], -1))
    if shape.norms_all_heads:
        parts[:2] = normed(parts[0], w.q_norm, shape.eps), normed(parts[1], w.k_norm, shape.eps)
    q, k, v = (part.view(batch, new, count, shape.head_dim) for part, count in zip(parts, heads, strict=True))
    if not shape.norms_all_heads:
        q, k = normed(q, w.q_norm, shape.eps), normed(k, w.k_norm, shape.eps)
    return rotate(q, cos_BS1D, sin_BS1D), rotate(k, cos_BS1D, sin_BS1D), v


def after_attention(
    x_BSC: torch.Tensor, gathered_BSHD: torch.Tensor, w: LayerWeights, shape: LayerShape
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream after attention, and what the MLP adds to it."""
    attended_BSC = normed(F.linear(gathered_BSHD.flatten(2), w.out, w.out_bias), w.post_attention_norm, shape.eps)
    x_BSC = x_BSC + _scaled(attended_BSC, shape)
    gate, up = F.linear(normed(x_BSC, w.mlp_norm, shape.eps), w.gate_up, w.gate_up_bias).chunk(2, dim=-1)
    added_BSC = normed(F.linear(F.silu(gate) * up, w.down, w.down_bias), w.post_mlp_norm, shape.eps)
    return x_BSC, _scaled(added_BSC, shape)


def _scaled(added_BSC: torch.Tensor, shape: LayerShape) -> torch.Tensor:
    return added_BSC if shape.residual == 1.0 else added_BSC * shape.residual


def layer(
    x_1SC: torch.Tensor,
    added_1SC: torch.Tensor,
    k_1KTD: torch.Tensor,
    v_1KTD: torch.Tensor,
    where: Where,
    last_1: torch.Tensor | None,
    w: LayerWeights,
    shape: LayerShape,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer for one sequence, whose earlier tokens are the first rows of its buffer.

    Takes and returns the residual stream as two summands, so that their addition is fused with the next kernel. With
    `last_1`, only that token goes past attention, because no other is needed of the last layer.
    """
    x_1SC = x_1SC + added_1SC
    qkv_1SX = qkv_products(x_1SC, w, shape)
    turn, at_S = (where.cos_1S1D, where.sin_1S1D), where.at_S
    if shape.fused:
        q = place_heads(qkv_1SX, w.q_norm, w.k_norm, shape.eps, *turn, k_1KTD, v_1KTD, at_S, shape.heads)
    else:
        q, k, v = queries_keys_values(qkv_1SX, *turn, w, shape)
        k_1KTD.index_copy_(2, at_S, k.transpose(1, 2))
        v_1KTD.index_copy_(2, at_S, v.transpose(1, 2))
    gathered = attend(q, k_1KTD, v_1KTD, where.length_1, True, shape.kernel, where.plan, shape.scale)
    if last_1 is not None:
        x_1SC, gathered = x_1SC.index_select(1, last_1), gathered.index_select(1, last_1)
    return after_attention(x_1SC, gathered, w, shape)


def layer_of_batch(
    x_BSC: torch.Tensor,
    added_BSC: torch.Tensor,
    cos_BS1D: torch.Tensor,
    sin_BS1D: torch.Tensor,
    k_1KTD: torch.Tensor,
    v_1KTD: torch.Tensor,
    held_1: torch.Tensor,
    own_k_BKTD: torch.Tensor,
    own_v_BKTD: torch.Tensor,
    at_BS: torch.Tensor,
    lengths_B: torch.Tensor,
    last_B: torch.Tensor | None,
    w: LayerWeights,
    shape: LayerShape,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer for several sequences that share their first `held` rows and have rows of their own after them.

    All queries attend to the shared rows as one sequence, and each to its own rows. The two results are combined by
    their softmax sums (Juravsky et al., "Hydragen", 2024).
    """
    x_BSC = x_BSC + added_BSC
    batch, new, _ = x_BSC.shape
    q, k, v = queries_keys_values(qkv_products(x_BSC, w, shape), cos_BS1D, sin_BS1D, w, shape)
    rows_B1 = torch.arange(batch, device=x_BSC.device)[:, None]
    own_k_BKTD[rows_B1, :, at_BS] = k
    own_v_BKTD[rows_B1, :, at_BS] = v
    as_one = q.reshape(1, batch * new, shape.heads, shape.head_dim)
    shared, shared_lse = attend_lse(as_one, k_1KTD, v_1KTD, held_1, False, shape.kernel, shape.scale)
    own, own_lse_BHS = attend_lse(q, own_k_BKTD, own_v_BKTD, lengths_B, True, shape.kernel, shape.scale)
    shared_lse_BHS = shared_lse.view(shape.heads, batch, new).transpose(0, 1)
    share_BSH1 = torch.sigmoid(shared_lse_BHS - own_lse_BHS).transpose(1, 2)[..., None]
    gathered = (shared.view(q.shape).float() * share_BSH1 + own.float() * (1 - share_BSH1)).to(q.dtype)
    if last_B is not None:
        x_BSC, gathered = x_BSC[rows_B1, last_B[:, None]], gathered[rows_B1, last_B[:, None]]
    return after_attention(x_BSC, gathered, w, shape)
