"""Where keys and values lie: a memory at the head of preallocated rows, and what follows it written behind."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from transformers import DynamicCache

from kvmem import dynamic_cache
from kvmem.dynamic_cache import KV

WIDE = torch.int64
"""Rows lie apart, and such copies go element by element: of eight bytes they take 0.85 ms for 894 MB on an H100, where
those of two take 1.38 and one stretch 0.61."""


class Buffer:
    """Keys and values of one sequence, each (layers, 1, kv_heads, rows, head_dim).

    They lie as in a stored cache, so that placing a memory copies whole stretches.
    """

    @torch.inference_mode()  # always: the compiler tells tensors made in it from others, and would compile twice
    def __init__(
        self, layers: int, rows: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        size = (layers, 1, kv_heads, rows, head_dim)
        # Zeros and not whatever lay there: a kernel multiplies rows that it masks by zero, and NaN would stay NaN.
        self.k_LBKTD = torch.zeros(size, dtype=dtype, device=device)
        self.v_LBKTD = torch.zeros(size, dtype=dtype, device=device)
        self.rows = rows
        self.layers: list[KV] = list(zip(self.k_LBKTD.unbind(), self.v_LBKTD.unbind(), strict=True))
        self.memory: weakref.ref[torch.Tensor] | None = None
        """The stored memory at the head, by the first of its tensors."""
        self.intact = 0
        """How many of that memory's rows are as they were stored."""

    def holds(self, cache: DynamicCache) -> bool:
        """Whether `cache`, or another that shares its tensors, is what lies at the head."""
        return self.memory is not None and self.memory() is _first_tensor(cache)

    @torch.inference_mode()
    def place(self, cache: DynamicCache, held: int) -> int:
        """Sees to it that the first `held` rows are `cache`'s; the rows that had to be copied."""
        start = self.intact if self.holds(cache) else 0
        if start < held:
            self.write(start, dynamic_cache.cut(cache, start, held))
        if not self.holds(cache):
            self.memory, self.intact = weakref.ref(_first_tensor(cache)), held
        self.intact = max(self.intact, held)
        return max(held - start, 0)

    def written_from(self, row: int) -> None:
        """Says that rows from `row` on are about to be overwritten."""
        self.intact = min(self.intact, row)

    @torch.inference_mode()
    def write(self, start: int, blocks: Sequence[KV]) -> None:
        """Rows from `start` on become the tokens of `blocks`, (1, kv_heads, tokens, head_dim) a layer."""
        end = start + blocks[0][0].shape[2]
        rows = [part[:, :, start:end] for pair in self.layers for part in pair]
        parts = [part for pair in blocks for part in pair]
        if all(map(_is_wide, rows)) and all(part.dtype == rows[0].dtype and _is_wide(part) for part in parts):
            rows, parts = [part.view(WIDE) for part in rows], [part.view(WIDE) for part in parts]
        torch._foreach_copy_(rows, parts, non_blocking=True)

    @torch.inference_mode()
    def read(self, start: int, end: int) -> list[KV]:
        """Copies of rows `start` to `end`, (1, kv_heads, tokens, head_dim) a layer."""
        return [(_copy(k[:, :, start:end]), _copy(v[:, :, start:end])) for k, v in self.layers]


def _is_wide(part: torch.Tensor) -> bool:
    """Whether it can be seen as elements of eight bytes."""
    elements = WIDE.itemsize // part.dtype.itemsize
    return part.stride(-1) == 1 and not any(
        size % elements for size in (part.shape[-1], part.storage_offset(), *part.stride()[:-1])
    )


def _copy(rows: torch.Tensor) -> torch.Tensor:
    return rows.clone(memory_format=torch.contiguous_format)


def _first_tensor(cache: DynamicCache) -> torch.Tensor:
    return dynamic_cache.layers_of(cache)[0][0]
