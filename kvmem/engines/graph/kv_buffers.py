"""Preallocated keys and values: a memory in the first rows, and the tokens after it in the rows behind."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from transformers import DynamicCache

from kvmem.cache import KV, dynamic_cache

WIDE = torch.int64
"""Copies of rows that are not contiguous go element by element. On an H100, 894 MB take 0.85 ms in elements of eight
bytes, 1.38 ms in elements of two, and 0.61 ms if contiguous."""


class Buffer:
    """Keys and values of one sequence, each (layers, 1, kv_heads, rows, head_dim).

    The layout is that of a stored cache, so that placing a memory copies contiguous stretches.
    """

    @torch.inference_mode()  # always, because the compiler would compile again for other tensors
    def __init__(
        self, layers: int, rows: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        size = (layers, 1, kv_heads, rows, head_dim)
        # Zeros, not uninitialized memory: a kernel multiplies masked rows by zero, and NaN would stay NaN.
        self.k_LBKTD = torch.zeros(size, dtype=dtype, device=device)
        self.v_LBKTD = torch.zeros(size, dtype=dtype, device=device)
        self.rows = rows
        self.layers: list[KV] = list(zip(self.k_LBKTD.unbind(), self.v_LBKTD.unbind(), strict=True))
        wide = head_dim * dtype.itemsize % WIDE.itemsize == 0
        self.wide: KV | None = (self.k_LBKTD.view(WIDE), self.v_LBKTD.view(WIDE)) if wide else None
        self.memory: weakref.ref[torch.Tensor] | None = None
        """The stored memory in the first rows, identified by the first of its tensors."""
        self.intact = 0
        """How many of that memory's rows are still as stored."""

    def holds(self, cache: DynamicCache) -> bool:
        """Whether `cache`, or another cache that shares its tensors, is in the first rows."""
        return self.memory is not None and self.memory() is dynamic_cache.layers_of(cache)[0][0]

    @torch.inference_mode()
    def place(self, cache: DynamicCache, held: int) -> int:
        """Makes the first `held` rows those of `cache`. Returns the number of rows that were copied."""
        layers = dynamic_cache.layers_of(cache)
        first = layers[0][0]
        holds = self.memory is not None and self.memory() is first
        start = self.intact if holds else 0
        if start < held:
            self.write(start, _rows_of(layers, start, held))
        if not holds:
            self.memory, self.intact = weakref.ref(first), held
        self.intact = max(self.intact, held)
        return max(held - start, 0)

    def written_from(self, row: int) -> None:
        """Records that rows from `row` on are about to be overwritten."""
        self.intact = min(self.intact, row)

    @torch.inference_mode()
    def overwrite(self) -> None:
        """Replaces every row by ones, so that the next `place` has to copy its memory. Not NaN: see the constructor."""
        self.k_LBKTD.fill_(1)
        self.v_LBKTD.fill_(1)
        self.intact = 0

    @torch.inference_mode()
    def write(self, start: int, blocks: Sequence[KV]) -> None:
        """Copies `blocks`, (1, kv_heads, tokens, head_dim) for each layer, to the rows from `start` on."""
        # Few calls, because the host takes longer than the GPU: the rows of all layers are sliced and copied at once.
        parts = [keys for keys, _ in blocks] + [values for _, values in blocks]
        k_LBKTD, v_LBKTD = self.k_LBKTD, self.v_LBKTD
        if self.wide is not None and _are_wide(parts, self.k_LBKTD.dtype):
            k_LBKTD, v_LBKTD = self.wide
            parts = [part.view(WIDE) for part in parts]
        tokens = parts[0].shape[2]
        rows = [*k_LBKTD.narrow(3, start, tokens).unbind(), *v_LBKTD.narrow(3, start, tokens).unbind()]
        torch._foreach_copy_(rows, parts, non_blocking=True)

    @torch.inference_mode()
    def read(self, start: int, end: int) -> list[KV]:
        """Copies of rows `start` to `end`, (1, kv_heads, tokens, head_dim) for each layer."""
        return [(_copy(k[:, :, start:end]), _copy(v[:, :, start:end])) for k, v in self.layers]


def _rows_of(layers: list[KV], start: int, end: int) -> list[KV]:
    """Tokens `start` to `end` of each layer, as views. `narrow` costs the host half of what slicing does."""
    if start == 0 and end == layers[0][0].shape[2]:
        return layers
    return [(keys.narrow(2, start, end - start), values.narrow(2, start, end - start)) for keys, values in layers]


def _are_wide(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> bool:
    """Whether all are of `dtype` and can be viewed as elements of eight bytes."""
    elements = WIDE.itemsize // dtype.itemsize
    layouts = {(part.dtype, part.shape[-1], part.stride()) for part in parts}  # in practice one or two
    return all(
        its == dtype and strides[-1] == 1 and not any(size % elements for size in (head_dim, *strides[:-1]))
        for its, head_dim, strides in layouts
    ) and not any([part.storage_offset() % elements for part in parts])


def _copy(rows: torch.Tensor) -> torch.Tensor:
    return rows.clone(memory_format=torch.contiguous_format)
