"""Triton kernels of a decoding step, which reads every weight once: operations around a product are part of it.

Tillet, Kung, Cox, "Triton", 2019. torch installs the package on platforms where it runs on a GPU.

Triton launches on the current device, so each kernel is launched with its tensors' device as the current one.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

HEADS_TOKENS = 8


class Block(NamedTuple):
    """What a block of threads reads of a weight: rows, elements of a row at once, and by how many warps."""

    rows: int
    cols: int
    warps: int


# The fastest of 23 to 37 candidates for Qwen3-8B's products on an H100, which read at 2.7 (small) to 3.14 TB/s.
PLAIN, ADDED, GATED = Block(2, 1024, 4), Block(2, 4096, 4), Block(2, 1024, 2)


@triton.jit
def _product(
    x,
    weight,
    norm,
    bias,
    added,
    out,
    rows,
    cols,
    eps,
    NORMED: tl.constexpr,
    BIASED: tl.constexpr,
    ADDED: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kept_R = row_R < rows
    col_C = tl.arange(0, COLS)
    weight_RC = weight + row_R.to(tl.int64)[:, None] * cols + col_C[None]
    up_RC = weight_RC + rows.to(tl.int64) * cols
    sums_RC = tl.zeros([ROWS, COLS], tl.float32)
    ups_RC = tl.zeros([ROWS, COLS], tl.float32)
    squares_C = tl.zeros([COLS], tl.float32)
    # Weights are read one step ahead, the first before the previous kernel, which computes x, has ended.
    ahead_RC = kept_R[:, None] & (col_C < cols)[None]
    w_RC = tl.load(weight_RC, mask=ahead_RC, other=0.0, eviction_policy="evict_first")
    w_up_RC = w_RC
    if GATED:
        w_up_RC = tl.load(up_RC, mask=ahead_RC, other=0.0, eviction_policy="evict_first")
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    for start in tl.range(0, cols, COLS):
        inside_C = start + col_C < cols
        x_C = tl.load(x + start + col_C, mask=inside_C, other=0.0).to(tl.float32)
        if NORMED:  # the factor is the same for all elements and known once all are read
            squares_C += x_C * x_C
            x_C *= tl.load(norm + start + col_C, mask=inside_C, other=0.0).to(tl.float32)
        sums_RC += w_RC.to(tl.float32) * x_C[None]
        ahead_RC = kept_R[:, None] & (start + COLS + col_C < cols)[None]
        w_RC = tl.load(weight_RC + start + COLS, mask=ahead_RC, other=0.0, eviction_policy="evict_first")
        if GATED:
            ups_RC += w_up_RC.to(tl.float32) * x_C[None]
            w_up_RC = tl.load(up_RC + start + COLS, mask=ahead_RC, other=0.0, eviction_policy="evict_first")
    y_R, up_R = tl.sum(sums_RC, 1), tl.sum(ups_RC, 1)
    if NORMED:
        scale = tl.rsqrt(tl.sum(squares_C, 0) / cols + eps)
        y_R, up_R = y_R * scale, up_R * scale
    if BIASED:
        y_R += tl.load(bias + row_R, mask=kept_R, other=0.0).to(tl.float32)
        if GATED:
            up_R += tl.load(bias + rows + row_R, mask=kept_R, other=0.0).to(tl.float32)
    if GATED:
        y_R = y_R * tl.sigmoid(y_R) * up_R
    if ADDED:
        y_R = y_R.to(out.dtype.element_ty).to(tl.float32) + tl.load(added + row_R, mask=kept_R, other=0.0)
    tl.store(out + row_R, y_R.to(out.dtype.element_ty), mask=kept_R)


def product(
    x_C: torch.Tensor,
    weight_RC: torch.Tensor,
    *,
    norm_C: torch.Tensor | None = None,
    eps: float = 0.0,
    bias_R: torch.Tensor | None = None,
    added_R: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """weight @ x + bias for one token, (rows,) in x's type, summed in fp32.

    norm_C: weights of an RMS normalization of x. gated: the first half of the weight gates the second,
    silu(gate) * up, and the result has half as many rows. added_R: what the result is added to.
    """
    cols, rows = weight_RC.shape[1], weight_RC.shape[0] // (2 if gated else 1)
    block = GATED if gated else PLAIN if added_R is None else ADDED
    out_R = x_C.new_empty(rows)
    with torch.cuda.device_of(x_C):
        _product[(triton.cdiv(rows, block.rows),)](
            x_C,
            weight_RC,
            _or(norm_C, x_C),
            _or(bias_R, x_C),
            _or(added_R, x_C),
            out_R,
            rows,
            cols,
            eps,
            norm_C is not None,
            bias_R is not None,
            added_R is not None,
            gated,
            block.rows,
            min(block.cols, triton.next_power_of_2(cols)),
            num_warps=block.warps,
            **_overlapping(x_C),
        )
    return out_R


@triton.jit
def _place_heads(
    qkv,
    q_norm,
    k_norm,
    cos,
    sin,
    at,
    q_out,
    k_out,
    v_out,
    new,
    rows,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    NORMED: tl.constexpr,
    TOKENS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(0)
    token_S = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    there_S = token_S < new
    dim_D = tl.arange(0, HALF)
    mask_SD = there_S[:, None] & (dim_D < HEAD_DIM // 2)[None]
    at_S = tl.load(at + token_S, mask=there_S, other=0)
    source_SD = qkv + token_S[:, None] * ((HEADS + 2 * KV_HEADS) * HEAD_DIM) + head * HEAD_DIM + dim_D[None]
    first_SD = tl.load(source_SD, mask=mask_SD, other=0.0).to(tl.float32)
    second_SD = tl.load(source_SD + HEAD_DIM // 2, mask=mask_SD, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        if NORMED:
            norm = tl.where(head < HEADS, q_norm, k_norm) + dim_D
            squares_S = tl.sum(first_SD * first_SD + second_SD * second_SD, 1)
            scale_S1 = tl.rsqrt(squares_S / HEAD_DIM + eps)[:, None]
            inside_D = dim_D < HEAD_DIM // 2
            first_SD *= scale_S1 * tl.load(norm, mask=inside_D, other=0.0).to(tl.float32)[None]
            second_SD *= scale_S1 * tl.load(norm + HEAD_DIM // 2, mask=inside_D, other=0.0).to(tl.float32)[None]
        turn_SD = token_S[:, None] * HEAD_DIM + dim_D[None]  # both halves of a head rotate by the same angles
        cos_SD = tl.load(cos + turn_SD, mask=mask_SD, other=0.0).to(tl.float32)
        sin_SD = tl.load(sin + turn_SD, mask=mask_SD, other=0.0).to(tl.float32)
        first_SD, second_SD = first_SD * cos_SD - second_SD * sin_SD, second_SD * cos_SD + first_SD * sin_SD
    if head < HEADS:
        target_SD = q_out + (token_S[:, None] * HEADS + head) * HEAD_DIM + dim_D[None]
    elif head < HEADS + KV_HEADS:
        target_SD = k_out + ((head - HEADS) * rows + at_S[:, None]) * HEAD_DIM + dim_D[None]
    else:
        target_SD = v_out + ((head - HEADS - KV_HEADS) * rows + at_S[:, None]) * HEAD_DIM + dim_D[None]
    tl.store(target_SD, first_SD.to(q_out.dtype.element_ty), mask=mask_SD)
    tl.store(target_SD + HEAD_DIM // 2, second_SD.to(q_out.dtype.element_ty), mask=mask_SD)


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
    """The queries of new tokens, (1, new, heads, head_dim), from their products, (1, new, …), with each head normalized
    (unless None) and rotated to its position. Writes their keys and values to the rows `at` of a buffer.

    cos, sin: (1, new, 1, head_dim), those of the new tokens. k, v: (1, kv_heads, rows, head_dim).
    """
    new, (_, kv_heads, rows, head_dim) = qkv.shape[1], k.shape
    tokens = 1 if new == 1 else HEADS_TOKENS
    q = qkv.new_empty(1, new, heads, head_dim)
    with torch.cuda.device_of(qkv):
        _place_heads[(heads + 2 * kv_heads, triton.cdiv(new, tokens))](
            qkv,
            _or(q_norm, qkv),
            _or(k_norm, qkv),
            cos,
            sin,
            at,
            q,
            k,
            v,
            new,
            rows,
            eps,
            heads,
            kv_heads,
            head_dim,
            triton.next_power_of_2(head_dim // 2),
            q_norm is not None,
            tokens,
            num_warps=1 if new == 1 else 4,
            **_overlapping(qkv),
        )
    return q


def _overlapping(tensor: torch.Tensor) -> dict[str, Any]:
    """Whether a kernel starts while the previous one ends (programmatic dependent launch, from Hopper on)."""
    return _overlapping_on(tensor.device)


@cache
def _overlapping_on(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {"OVERLAPS": False}
    return {"OVERLAPS": True, "launch_pdl": True}


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A kernel needs a tensor for each argument, including those that it does not read."""
    return other if tensor is None else tensor
