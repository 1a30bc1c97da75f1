"""One attention kernel, one file: queries against the first rows of a buffer, whose length is data on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import ClassVar

import torch

from kvmem.errors import ConfigError, did_you_mean
from kvmem.registry import Registry

AUTO = "auto"


class Attention(ABC):
    """A kernel. All take q (batch, new, heads, head_dim), keys and values (batch, kv_heads, rows, head_dim)
    as they lie in a buffer, and lengths (batch,) int32: how many rows hold tokens, the new ones included.

    causal: the new tokens are the last of them, and each sees itself and what lies before it (a lower-right mask);
    else every query sees the first `lengths` rows. Scores are scaled by 1 / sqrt(head_dim).
    """

    name: ClassVar[str]
    speed: ClassVar[int]
    """The highest that runs here is taken where the configuration says auto."""

    @classmethod
    @abstractmethod
    def why_not(cls, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why this kernel can't be used here; None: it can."""

    @staticmethod
    def plan(q_like_BSHD: torch.Tensor, k_BKTD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor | None:
        """What the kernel wants to know of a pass, found once for all its layers, whose shapes and lengths are these.

        Causal, as all of a pass is. None: nothing.
        """
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
    ) -> torch.Tensor:
        """The values that each query gathers, like q."""

    @staticmethod
    @abstractmethod
    def attend_lse(
        q_BSHD: torch.Tensor, k_BKTD: torch.Tensor, v_BKTD: torch.Tensor, lengths_B: torch.Tensor, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, and the logarithm of each softmax's sum, (batch, heads, new) fp32: parts join by it."""


@cache
def kernels() -> dict[str, type[Attention]]:
    """Every kernel, by name."""
    return Registry(Attention, "kvmem.engines.graph.attention", "attention kernel").classes()


def choose(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The name of the kernel to use: `name` itself, or with auto the fastest that runs here.

    Raises ConfigError for an unknown name, or a kernel that does not run here, with the reason.
    """
    known = kernels()
    if name != AUTO and name not in known:
        raise ConfigError(f"Unknown attention {name!r}. {did_you_mean(name, [AUTO, *known])}")
    asked = list(known) if name == AUTO else [name]
    reasons = {kernel: known[kernel].why_not(device, dtype, head_dim) for kernel in asked}
    usable = [kernel for kernel in asked if reasons[kernel] is None]
    if not usable:
        told = "; ".join(f"{kernel}: {reason}" for kernel, reason in reasons.items())
        raise ConfigError(f"attention={name} does not run here ({told}). Use attention=auto.")
    return max(usable, key=lambda kernel: known[kernel].speed)


# Custom operators, so that a compiled layer calls the kernel as it is and does not look inside. They take a buffer as
# it lies: of a transposed one that it has written to, the compiler would pass a copy.
@torch.library.custom_op("kvmem::attend", mutates_args=())
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    causal: bool,
    kernel: str,
    plan: torch.Tensor | None,
) -> torch.Tensor:
    """The kernel called `kernel` as a custom operator; see `Attention.attend`."""
    return kernels()[kernel].attend(q, k, v, lengths, causal, plan)


@attend.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    causal: bool,
    kernel: str,
    plan: torch.Tensor | None,
) -> torch.Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("kvmem::attend_lse", mutates_args=())
def attend_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, causal: bool, kernel: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel called `kernel` as a custom operator; see `Attention.attend_lse`."""
    return kernels()[kernel].attend_lse(q, k, v, lengths, causal)


@attend_lse.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, causal: bool, kernel: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
