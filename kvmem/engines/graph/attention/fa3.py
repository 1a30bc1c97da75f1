"""FlashAttention 3 for Hopper, as packaged for torch (PyPI: fa3-fwd). Shah et al., "FlashAttention-3", 2024."""

from __future__ import annotations

import importlib.util
import math
from typing import ClassVar

import torch

from kvmem.engines.graph.attention.base import Attention

QUERY_TILE = 128  # rows of a tile, into which the query heads that share a key head are packed
KEY_TILE = 128  # about the rows of the buffer that a block reads at once; no split is shorter


class FA3(Attention):
    """Splits the keys of a query among as many blocks as fit the GPU.

    The kernel's own choice is for the buffer's capacity. On an H100, for 36 layers behind 6064 tokens, it took 2.7 ms
    for 167 new tokens, where two splits take 2.1, and 4.0 ms for 303, where no split takes 3.3.
    """

    name: ClassVar[str] = "fa3"
    speed: ClassVar[int] = 2

    @classmethod
    def why_not(cls, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device)[0] != 9:
            return "needs a Hopper GPU"
        if importlib.util.find_spec("fa3_fwd_interface") is None:
            return "needs the package fa3-fwd"
        if dtype not in (torch.bfloat16, torch.float16):
            return "needs bfloat16 or float16"
        if head_dim > 256 or head_dim % 8:
            return f"takes heads of up to 256, in steps of 8, not {head_dim}"
        return None

    @staticmethod
    def plan(q_like_BSHD: torch.Tensor, k_BKTD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor | None:
        """How the kernel divides the work. Otherwise it computes this in every layer, in a kernel of 3 µs."""
        from fa3_fwd_interface import get_scheduler_metadata

        batch, new, heads, head_dim = q_like_BSHD.shape
        _, kv_heads, rows, _ = k_BKTD.shape
        plan: torch.Tensor = get_scheduler_metadata(
            batch,
            new,
            rows,
            heads,
            kv_heads,
            head_dim,
            lengths_B,
            qkv_dtype=q_like_BSHD.dtype,
            causal=True,
            num_splits=splits(q_like_BSHD, k_BKTD),
        )
        return plan

    @staticmethod
    def attend(
        q_BSHD: torch.Tensor,
        k_BKTD: torch.Tensor,
        v_BKTD: torch.Tensor,
        lengths_B: torch.Tensor,
        causal: bool,
        plan: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        return _forward(q_BSHD, k_BKTD, v_BKTD, lengths_B, causal, plan, scale)[0]

    @staticmethod
    def attend_lse(
        q_BSHD: torch.Tensor,
        k_BKTD: torch.Tensor,
        v_BKTD: torch.Tensor,
        lengths_B: torch.Tensor,
        causal: bool,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _forward(q_BSHD, k_BKTD, v_BKTD, lengths_B, causal, None, scale)


def _forward(
    q_BSHD: torch.Tensor,
    k_BKTD: torch.Tensor,
    v_BKTD: torch.Tensor,
    lengths_B: torch.Tensor,
    causal: bool,
    plan: torch.Tensor | None,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    from fa3_fwd_interface import flash_attn_with_kvcache

    out_BSHD, lse_BHS, *_ = flash_attn_with_kvcache(
        q_BSHD,
        k_BKTD.transpose(1, 2),
        v_BKTD.transpose(1, 2),
        cache_seqlens=lengths_B,
        causal=causal,
        softmax_scale=scale,
        num_splits=splits(q_BSHD, k_BKTD),
        scheduler_metadata=plan,
        return_softmax_lse=True,
    )
    return out_BSHD, lse_BHS


def splits(q_BSHD: torch.Tensor, k_BKTD: torch.Tensor) -> int:
    """The number of parts of each key sequence with which the tiles of all queries fill the GPU's processors once."""
    batch, new, heads, _ = q_BSHD.shape
    _, kv_heads, rows, _ = k_BKTD.shape
    tiles = batch * kv_heads * math.ceil(new * (heads // kv_heads) / QUERY_TILE)
    processors = torch.cuda.get_device_properties(k_BKTD.device).multi_processor_count
    return max(1, min(processors // tiles, rows // KEY_TILE))
