"""Each Triton kernel beside torch, on the device named: a GPU, or with TRITON_INTERPRET=1 a CPU. Raises where they
differ by more than rounding."""

from __future__ import annotations

import itertools
import sys

import torch
import torch.nn.functional as F

from kvmem.engines.graph.families import FAMILIES
from kvmem.engines.graph.kv_buffers import Buffer
from kvmem.engines.graph.layers import rms_norm, rotate
from kvmem.engines.graph.model import ModelRunner
from kvmem.engines.graph.triton_kernels import place_heads, product
from tests.graph.families import VARIANTS, family_model
from tests.helpers.tiny import SHAPES, loaded

EPS = 1e-6
CLOSE = {torch.float32: {"atol": 2e-5, "rtol": 2e-5}, torch.bfloat16: {"atol": 0.08, "rtol": 0.02}}
"""Of values of about one; torch rounds to bf16 in between, the kernels do not."""


def products(device: str, dtype: torch.dtype) -> None:
    """Rows and columns that are not multiples of a block; one block; several blocks."""
    for rows, cols, biased in itertools.product((2, 37), (72, 1024, 2050), (False, True)):
        x, norm, added = _random(cols, device, dtype), _random(cols, device, dtype), _random(rows, device, dtype)
        weight = (_random((2 * rows, cols), device, torch.float32) / cols**0.5).to(dtype)
        bias = _random(2 * rows, device, dtype) if biased else None
        first_bias = bias[:rows].contiguous() if bias is not None else None
        plain = F.linear(rms_norm(x, norm, EPS), weight, bias)
        torch.testing.assert_close(product(x, weight, norm_C=norm, eps=EPS, bias_R=bias), plain, **CLOSE[dtype])
        gate, up = plain.chunk(2)
        gated = product(x, weight, norm_C=norm, eps=EPS, bias_R=bias, gated=True)
        torch.testing.assert_close(gated, F.silu(gate) * up, **CLOSE[dtype])
        first = weight[:rows].contiguous()
        grown = product(x, first, bias_R=first_bias, added_R=added)
        torch.testing.assert_close(grown, added + F.linear(x, first, first_bias), **CLOSE[dtype])


def heads(device: str, dtype: torch.dtype) -> None:
    """One token and several, head sizes that are not a power of two, with the heads' normalisation and without."""
    count, kv_count, rows, held = 4, 2, 40, 7
    for new, size, normed in itertools.product((1, 5, 17), (64, 96), (False, True)):
        qkv = _random((1, new, (count + 2 * kv_count) * size), device, dtype)
        cos, sin = (_random((1, new, 1, size // 2), device, dtype).repeat(1, 1, 1, 2) for _ in "cs")
        k, v = (torch.zeros(1, kv_count, rows, size, device=device, dtype=dtype) for _ in "kv")
        at = held + torch.arange(new, device=device)
        norms = [_random(size, device, dtype) if normed else None for _ in "qk"]
        q = place_heads(qkv, *norms, EPS, cos, sin, k, v, at, count)
        parts = qkv.view(1, new, -1, size).split([count, kv_count, kv_count], 2)
        turned = [
            rotate(part if norm is None else rms_norm(part, norm, EPS), cos, sin)
            for part, norm in zip(parts[:2], norms, strict=True)
        ]
        torch.testing.assert_close(q, turned[0], **CLOSE[dtype])
        torch.testing.assert_close(k[:, :, at], turned[1].transpose(1, 2), **CLOSE[dtype])
        assert torch.equal(v[:, :, at], parts[2].transpose(1, 2))
        others = [row for row in range(rows) if row not in at.tolist()]
        assert not k[:, :, others].any() and not v[:, :, others].any()


def a_token(device: str, family: str) -> None:
    """The whole pass over several tokens and over one more, fused and as written: logits, and the buffer's rows."""
    model = (family_model(family) if family in VARIANTS else loaded(SHAPES[family])).model.to(device)
    ids = torch.randint(1000, 40000, (9,)).tolist()
    ends: list[tuple[torch.Tensor, ...]] = []
    for fused in (False, True):
        run = ModelRunner(model, FAMILIES[family], "sdpa", 32, "none", fused)
        run.head = run.head[:64]  # with a whole vocabulary the interpreter takes minutes
        buffer = Buffer(len(run.layers), 32, run.shape.kv_heads, run.shape.head_dim, model.dtype, model.device)
        run(torch.tensor([0, 8, *ids[:8]], device=device), buffer)
        _, logits_V = run(torch.tensor([8, 1, ids[8]], device=device), buffer)
        ends.append((logits_V, buffer.k_LBKTD, buffer.v_LBKTD))
    for as_written, by_kernels in zip(*ends, strict=True):
        torch.testing.assert_close(by_kernels, as_written, atol=1e-4, rtol=1e-4)


def _random(size: int | tuple[int, ...], device: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, dtype=torch.float32).to(device, dtype)


if __name__ == "__main__":
    torch.manual_seed(0)
    for dtype in CLOSE:
        products(sys.argv[1], dtype)
        heads(sys.argv[1], dtype)
    for family in (*SHAPES, "granite"):  # heads normalised or not, biases or not, factors
        a_token(sys.argv[1], family)
