"""The interface of an attention kernel: queries attend to the first rows of a buffer, of which lengths are data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import ClassVar

import torch

from kvmem.errors import ConfigError, did_you_mean
from kvmem.registry import Registry

AUTO = "auto"


class Attention(ABC):
    """A kernel. It takes q (batch, new, heads, head_dim), keys and values (batch, kv_heads, rows, head_dim) in a
    buffer's layout, and lengths (batch,) int32: how many rows hold tokens, including the new ones.

    causal: the new tokens are the last rows, and each attends to itself and to the rows before it (a lower-right mask).
    Otherwise every query attends to the first `lengths` rows. Scores are scaled by `scale`, or with None by
    1 / sqrt(head_dim).
    """

    name: ClassVar[str]
    speed: ClassVar[int]
    """With auto, the kernel with the highest value that runs here is used."""

    @classmethod
    @abstractmethod
    def why_not(cls, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """The reason why this kernel can't be used here; None if it can."""

    @staticmethod
    def plan(q_like_BSHD: torch.Tensor, k_BKTD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor | None:
        """What the kernel computes once for all layers of a causal pass, from shapes and lengths; None: nothing."""
        return None

    @staticmethod
    @abstractmethod
    def attend(
        q_BSHD: torch.Tensor,
        k_BKTD: torch.Tensor,
        v_BKTD: torch.Tensor,
        lengths_B: torch.Tensor,
        causal: bool,
        plan: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        """The attention output, of the shape of q."""

    @staticmethod
    @abstractmethod
    def attend_lse(
        q_BSHD: torch.Tensor,
        k_BKTD: torch.Tensor,
        v_BKTD: torch.Tensor,
        lengths_B: torch.Tensor,
        causal: bool,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, and the log-sum-exp of each softmax, (batch, heads, new) fp32, by which parts are combined."""


@cache
def kernels() -> dict[str, type[Attention]]:
    """All kernels by name."""
    return Registry(Attention, "kvmem.engines.graph.attention", "attention kernel").classes()


def choose(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The name of the kernel to use: `name` itself, or with auto the fastest that runs here.

    Raises ConfigError for an unknown name, or a kernel that does not run here, with the reason.
    """
    known = kernels()
    if name != AUTO and name not in known:
        raise ConfigError(f"Unknown attention {name!r}. {did_you_mean(name, [AUTO, *known])}")
    candidates = list(known) if name == AUTO else [name]
    reasons = {kernel: known[kernel].why_not(device, dtype, head_dim) for kernel in candidates}
    usable = [kernel for kernel in candidates if reasons[kernel] is None]
    if not usable:
        why = "; ".join(f"{kernel}: {reason}" for kernel, reason in reasons.items())
        raise ConfigError(f"attention={name} does not run here ({why}). Use attention=auto.")
    return max(usable, key=lambda kernel: known[kernel].speed)


# Custom operators, so that a compiled layer calls the kernel without tracing it. They take a buffer in its own layout:
# of a transposed buffer that it has written to, the compiler would pass a copy.
@torch.library.custom_op("kvmem::attend", mutates_args=())
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    causal: bool,
    kernel: str,
    plan: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """The kernel called `kernel` as a custom operator; see `Attention.attend`."""
    return kernels()[kernel].attend(q, k, v, lengths, causal, plan, scale)


@attend.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    causal: bool,
    kernel: str,
    plan: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("kvmem::attend_lse", mutates_args=())
def attend_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    causal: bool,
    kernel: str,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel called `kernel` as a custom operator; see `Attention.attend_lse`."""
    return kernels()[kernel].attend_lse(q, k, v, lengths, causal, scale)


@attend_lse.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    causal: bool,
    kernel: str,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
