"""The FlashAttention that comes with torch: any CUDA device from Ampere on, lengths on the device.

Calls the operator under torch.nn.attention.varlen directly, because the public function takes `seqused_k` only from
torch 2.13 on. Dao, "FlashAttention-2", 2023.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from kvmem.engines.graph.attention.base import Attention


class Flash(Attention):
    """The operator needs the rows of several sequences concatenated, so it gets a copy of them."""

    name: ClassVar[str] = "torch_flash"
    speed: ClassVar[int] = 1

    @classmethod
    def why_not(cls, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if device.type != "cuda" or torch.version.hip:
            return "needs an NVIDIA GPU"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "needs compute capability 8.0"
        if dtype not in (torch.bfloat16, torch.float16):
            return "needs bfloat16 or float16"
        if head_dim > 256 or head_dim % 8:
            return f"does not take heads of {head_dim}"
        return None

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
        return Flash.attend_lse(q_BSHD, k_BKTD, v_BKTD, lengths_B, causal, scale)[0]

    @staticmethod
    def attend_lse(
        q_BSHD: torch.Tensor,
        k_BKTD: torch.Tensor,
        v_BKTD: torch.Tensor,
        lengths_B: torch.Tensor,
        causal: bool,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, new, heads, _ = q_BSHD.shape
        rows = k_BKTD.shape[2]
        starts = [torch.arange(0, batch * n + 1, n, dtype=torch.int32, device=q_BSHD.device) for n in (new, rows)]
        out_NHD, lse_HN, *_ = torch.ops.aten._flash_attention_forward(
            q_BSHD.flatten(0, 1),
            *(x.transpose(1, 2).flatten(0, 1) for x in (k_BKTD, v_BKTD)),
            *starts,
            new,
            rows,
            0.0,
            causal,
            False,
            scale=scale,
            seqused_k=lengths_B,
        )
        return out_NHD.view(q_BSHD.shape), lse_HN.view(heads, batch, new).transpose(0, 1)
