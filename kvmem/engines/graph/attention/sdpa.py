"""torch's scaled_dot_product_attention, which runs everywhere, with an explicit mask."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F

from kvmem.engines.graph.attention.base import Attention


class SDPA(Attention):
    """On a CPU, only over rows that hold tokens. On a GPU, where the host does not know the length, over all rows."""

    name: ClassVar[str] = "sdpa"
    speed: ClassVar[int] = 0

    @classmethod
    def why_not(cls, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
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
        k_BKTD, v_BKTD = _with_tokens(k_BKTD, v_BKTD, lengths_B)
        whole = causal and k_BKTD.shape[2] == q_BSHD.shape[1]  # nothing before them, so a plain causal mask is enough
        out_BHSD = F.scaled_dot_product_attention(
            q_BSHD.transpose(1, 2),
            k_BKTD,
            v_BKTD,
            attn_mask=None if whole else _mask(q_BSHD, k_BKTD, lengths_B, causal),
            is_causal=whole,
            enable_gqa=True,
            scale=scale,
        )
        return out_BHSD.transpose(1, 2).contiguous()

    @staticmethod
    def attend_lse(
        q_BSHD: torch.Tensor,
        k_BKTD: torch.Tensor,
        v_BKTD: torch.Tensor,
        lengths_B: torch.Tensor,
        causal: bool,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        k_BKTD, v_BKTD = _with_tokens(k_BKTD, v_BKTD, lengths_B)
        group = q_BSHD.shape[2] // k_BKTD.shape[1]
        k_BHTD, v_BHTD = (x.repeat_interleave(group, dim=1) for x in (k_BKTD, v_BKTD))
        divisor = math.sqrt(q_BSHD.shape[-1]) if scale is None else 1 / scale
        scores_BHST = q_BSHD.transpose(1, 2) @ k_BHTD.transpose(2, 3) / divisor
        scores_BHST = scores_BHST.float().masked_fill(~_mask(q_BSHD, k_BKTD, lengths_B, causal), -torch.inf)
        lse_BHS = scores_BHST.logsumexp(-1)
        out_BHSD = (scores_BHST - lse_BHS[..., None]).exp().to(q_BSHD.dtype) @ v_BHTD
        return out_BHSD.transpose(1, 2).contiguous(), lse_BHS


def _with_tokens(
    k_BKTD: torch.Tensor, v_BKTD: torch.Tensor, lengths_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if k_BKTD.device.type != "cpu":
        return k_BKTD, v_BKTD
    rows = int(lengths_B.max())
    return k_BKTD[:, :, :rows], v_BKTD[:, :, :rows]


def _mask(q_BSHD: torch.Tensor, k_BKTD: torch.Tensor, lengths_B: torch.Tensor, causal: bool) -> torch.Tensor:
    """True where a query attends to a row: (batch, 1, new or 1, rows)."""
    new, at_T = q_BSHD.shape[1], torch.arange(k_BKTD.shape[2], device=q_BSHD.device)
    if not causal:
        return at_T < lengths_B[:, None, None, None]
    back_S = torch.arange(new, device=q_BSHD.device) - new
    return at_T <= (lengths_B[:, None] + back_S)[:, None, :, None]
