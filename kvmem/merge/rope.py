"""Rotates cached keys to another position: K' = R(new) R(old)⁻¹ K.

Rotary embeddings rotate each pair of key dimensions by an angle that depends on the position (Su et al. 2021, RoFormer,
section 3.2). The angles are asked of the model itself, so every scaling of them (linear, YaRN, llama3, long-RoPE) is
the model's own.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from kvmem.cache import observing

Pairing = Literal["halves", "neighbours"]
"""Which dimensions make a pair: i and i + half of them, or 2i and 2i + 1."""


class Rotation(NamedTuple):
    """cos and sin of the angles by which each token's key is rotated, (tokens, pairs), fp32."""

    cos_TF: torch.Tensor
    sin_TF: torch.Tensor

    @classmethod
    def between(cls, old: Rotation, new: Rotation) -> Rotation:
        """The rotation that undoes `old` and does `new`. It is none at all, to the bit, where they are equal."""
        size_TF = old.cos_TF.square() + old.sin_TF.square()  # not 1 if the model scales its cos and sin, or rounds them
        cos_TF = (new.cos_TF * old.cos_TF + new.sin_TF * old.sin_TF) / size_TF
        return cls(cos_TF, (new.sin_TF * old.cos_TF - new.cos_TF * old.sin_TF) / size_TF)


class Layout(NamedTuple):
    """Which dimensions of a key are rotated, from `start` on, in which pairs, and in which sense."""

    pairing: Pairing
    start: int
    sense: Literal[1, -1] = 1
    """-1 where a model rotates from the second dimension of a pair to the first (nanochat)."""

    @classmethod
    def possible(cls, head_dim: int, pairs: int) -> list[Layout]:
        """All layouts for that many pairs: the first dimensions of a key or the last ones, in both pairings."""
        starts = sorted({0, head_dim - 2 * pairs}) if 0 < 2 * pairs <= head_dim else []
        pairings: tuple[Pairing, ...] = ("halves", "neighbours")
        senses: tuple[Literal[1, -1], ...] = (1, -1)
        return [cls(pairing, start, sense) for sense in senses for start in starts for pairing in pairings]

    def parts(self, keys_BHTD: torch.Tensor, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first and the second dimension of each pair, each (batch, heads, tokens, pairs), as views."""
        rotated = keys_BHTD[..., self.start : self.start + 2 * pairs]
        if self.pairing == "halves":
            return rotated[..., :pairs], rotated[..., pairs:]
        return rotated[..., 0::2], rotated[..., 1::2]


def rotate(keys_BHTD: torch.Tensor, rotation: Rotation, layout: Layout) -> None:
    """Rotates keys (batch, kv_heads, tokens, head_dim) in place, computed in fp32. Unmoved keys keep their bits.

    Uses few and large operations, because on a GPU the cost is that of the kernel launches.
    """
    cos_TF, sin_TF = (part.to(keys_BHTD.device) for part in rotation)
    views = layout.parts(keys_BHTD, cos_TF.shape[-1])
    first, second = (view.float() for view in views)
    rotated = (
        (first * cos_TF).addcmul_(second, sin_TF, value=-layout.sense),
        (second * cos_TF).addcmul_(first, sin_TF, value=layout.sense),
    )
    for view, values in zip(views, rotated, strict=True):
        view.copy_(values)


class Rotary(NamedTuple):
    """One way in which a model computes the angles of positions: a call of its rotary module, or a table of them."""

    source: _Call | _Table

    def at(self, positions_T: torch.Tensor) -> Rotation:
        """cos and sin at each position, (tokens,) int64. A model may choose its frequencies by the largest one."""
        return self.source.at(positions_T)


@dataclass(frozen=True)
class _Call:
    """A recorded call of a module without weights that makes cos and sin of positions."""

    module: nn.Module
    """A copy: some modules keep the longest length that they have seen."""
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    positions: torch.Tensor
    """The argument among `args` or `kwargs` that holds the positions."""
    repeat: Literal["halves", "neighbours", "none"]
    """How the module repeats each angle for the two dimensions of its pair."""

    @torch.inference_mode()
    def at(self, positions_T: torch.Tensor) -> Rotation:
        self._output(positions_T[:1] * 0)  # a module that adapts to the length begins anew with a short one
        pair = _cos_and_sin(self._output(positions_T))
        assert pair is not None  # it was a pair when the call was recorded
        cos_TW, sin_TW = pair
        width = cos_TW.shape[-1]
        if self.repeat == "halves":
            cos_TW, sin_TW = cos_TW[:, : width // 2], sin_TW[:, : width // 2]
        elif self.repeat == "neighbours":
            cos_TW, sin_TW = cos_TW[:, ::2], sin_TW[:, ::2]
        return Rotation(cos_TW.float(), sin_TW.float())

    def _output(self, positions_T: torch.Tensor) -> Any:
        shaped = positions_T.to(self.positions.device).expand(*self.positions.shape[:-1], len(positions_T))

        def given(argument: Any) -> Any:
            return shaped if argument is self.positions else argument

        return self.module(*map(given, self.args), **{name: given(value) for name, value in self.kwargs.items()})


@dataclass(frozen=True)
class _Table:
    """A model's tensor of sin and cos of each position, (positions, 2 pairs): first all sin, then all cos."""

    sin_cos_PW: torch.Tensor

    def at(self, positions_T: torch.Tensor) -> Rotation:
        sin_TF, cos_TF = self.sin_cos_PW[positions_T.to(self.sin_cos_PW.device)].float().chunk(2, dim=-1)
        return Rotation(cos_TF, sin_TF)


@contextmanager
def rotary_calls(model: nn.Module, positions: Sequence[int], found: list[Rotary]) -> Iterator[None]:
    """Inside the block, appends to `found` how this thread's forward passes over `positions` compute their angles.

    Modules are recognized by what they do: they have no weights, take the positions, and return cos and sin.
    """
    thread, wanted = threading.get_ident(), list(positions)
    seen: list[tuple[nn.Module, list[str]]] = []
    calls: list[_Call] = []

    @observing
    def after(module: nn.Module, args: tuple[Any, ...], *others: Any) -> None:
        # Another thread may have listed this hook before it was removed: torch then calls it without keywords.
        if threading.get_ident() != thread or len(others) != 2:
            return
        kwargs, output = others
        given = [*args, *kwargs.values()]
        at = next((value for value in given if _holds(value, wanted)), None)
        if at is None or (pair := _cos_and_sin(output)) is None:
            return
        call = module, [str(value) for value in given if not isinstance(value, torch.Tensor)]
        if call in seen:
            return
        seen.append(call)
        small = tuple(_small(value, at) for value in args), {name: _small(value, at) for name, value in kwargs.items()}
        calls.append(_Call(module, *small, at, _repeat(*pair)))

    hooks = [
        module.register_forward_hook(after, with_kwargs=True)
        for module in model.modules()
        if next(module.parameters(), None) is None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    found += [Rotary(replace(call, module=copy.deepcopy(call.module))) for call in calls]  # now without the hooks


def rotary_tables(model: nn.Module, positions: int) -> Iterator[Rotary]:
    """The tensors of the model that hold sin and cos of that many positions, without duplicates."""
    seen: list[torch.Tensor] = []
    for tensor in (*model.buffers(), *model.parameters()):
        if tensor.dim() != 2 or tensor.shape[0] < positions or tensor.shape[1] % 2 or not tensor.is_floating_point():
            continue
        rows = tensor[:: max(1, tensor.shape[0] // 8)].detach().float()
        sin_TF, cos_TF = rows.chunk(2, dim=-1)
        is_table = bool(((sin_TF.square() + cos_TF.square() - 1).abs() < 1e-2).all())
        if is_table and not any(torch.equal(tensor, other) for other in seen):
            seen.append(tensor)
            yield Rotary(_Table(tensor.detach()))


def _holds(value: Any, positions: list[int]) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.dtype == torch.int64
        and value.dim() > 0
        and value.shape[-1] == len(positions)
        and value.reshape(-1, len(positions))[0].tolist() == positions
    )


def _small(value: Any, positions: torch.Tensor) -> Any:
    """The argument, without the memory of hidden states: a rotary module takes their dtype and device only."""
    if value is positions or not isinstance(value, torch.Tensor):
        return value
    return value[:1, :1].clone() if value.dim() > 2 else value


def _cos_and_sin(output: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """cos and sin, each (tokens, width), of what a module returned; None if it is neither a pair of them nor complex.

    Further dimensions in front are those of a batch, or of image coordinates, which are equal for text.
    """
    if isinstance(output, torch.Tensor) and output.is_complex():
        output = output.real, output.imag
    if not (isinstance(output, tuple) and len(output) == 2):
        return None
    cos, sin = output
    both = isinstance(cos, torch.Tensor) and isinstance(sin, torch.Tensor) and cos.shape == sin.shape and cos.dim() > 1
    if not both or not cos.is_floating_point():
        return None
    return cos.reshape(-1, *cos.shape[-2:])[0], sin.reshape(-1, *sin.shape[-2:])[0]


def _repeat(cos_TW: torch.Tensor, sin_TW: torch.Tensor) -> Literal["halves", "neighbours", "none"]:
    def equal(first: slice, second: slice) -> bool:
        return all(torch.equal(part[:, first], part[:, second]) for part in (cos_TW, sin_TW))

    width = cos_TW.shape[-1]
    if width % 2:
        return "none"
    if equal(slice(0, width // 2), slice(width // 2, None)):
        return "halves"
    return "neighbours" if equal(slice(0, None, 2), slice(1, None, 2)) else "none"
