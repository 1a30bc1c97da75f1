"""Converts an engine's blocks to keys and values of shape (tokens, kv_heads, head_dim), after RoPE, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from vllm import _custom_ops as ops

from kvmem.errors import EngineError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KV = tuple[torch.Tensor, torch.Tensor]
COVERED = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
"""vLLM's names of the attention backends whose layouts are known here."""
MOST_ENTRIES = 256
"""A float of any KV dtype holds whole numbers up to this exactly."""


class Layout(ABC):
    """The layout of one engine's blocks.

    `cache` is one layer's tensor. `slots` are positions of tokens in it: block id × block_size + offset.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    def write(self, cache: torch.Tensor, layer: Any, kv: KV, slots: torch.Tensor) -> None:
        """Writes tokens to `slots`, with the kernel by which the engine stores what it computes.

        kv: keys and values, each (tokens, kv_heads, head_dim) with any strides of tokens and heads, on the cache's
        device, of its dtype.
        """
        layer.impl.do_kv_cache_update(layer, *kv, cache, slots)

    @abstractmethod
    def read(self, cache: torch.Tensor, layer: Any, block_ids: torch.Tensor, tokens: int) -> KV:
        """Contiguous copies of the first `tokens` tokens of these blocks, each (tokens, kv_heads, head_dim)."""

    def slots(self, block_ids: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """The slots of tokens `start` to `end` of a request with these blocks."""
        at = torch.arange(start, end, device=block_ids.device)
        return block_ids[at // self.block_size] * self.block_size + at % self.block_size


class CPUPacked(Layout):
    """vLLM's CPU attention. A block is (kv_heads, block_size, 2 × head_dim): its first half holds the keys, packed for
    the chip's matrix instructions, and its second half holds the values in plain order.

    The packing differs between chips. It is found at run time: the engine's own kernel packs a block whose entries are
    their own positions.
    """

    def __init__(self, block_size: int) -> None:
        super().__init__(block_size)
        self.unpacking: dict[tuple[str, int, torch.dtype], torch.Tensor] = {}

    def read(self, cache: torch.Tensor, layer: Any, block_ids: torch.Tensor, tokens: int) -> KV:
        packed, values = (half[block_ids] for half in self._halves(cache))  # (blocks, kv_heads, block_size, head_dim)
        blocks, kv_heads, block_size, head_dim = values.shape
        unpacking = self._unpacking(layer.isa, head_dim, cache.dtype)
        keys = packed.reshape(blocks, kv_heads, block_size * head_dim)[..., unpacking].view_as(values)
        keys_THD, values_THD = (
            half.transpose(1, 2).reshape(-1, kv_heads, head_dim)[:tokens].contiguous() for half in (keys, values)
        )
        return keys_THD, values_THD

    @staticmethod
    def _halves(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks, kv_heads, block_size, twice_head_dim = cache.shape
        keys, values = cache.view(blocks, kv_heads, 2 * block_size, twice_head_dim // 2).chunk(2, dim=2)
        return keys, values

    @staticmethod
    def _pack(kv: KV, halves: KV, slots: torch.Tensor, isa: str) -> None:
        ops.cpu_attn_reshape_and_cache(*kv, *halves, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto")

    def _unpacking(self, isa: str, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        """Where a packed block holds a plain one's entries: packed.flatten()[unpacking] is (block_size, head_dim)."""
        key = (isa, head_dim, dtype)
        if key not in self.unpacking:
            if max(self.block_size, head_dim) > MOST_ENTRIES:
                raise EngineError(
                    f"Entries of blocks of {self.block_size} tokens with heads of {head_dim} can't be distinguished: "
                    f"{MOST_ENTRIES} is the most. Use block_size=128."
                )
            packed_from = torch.zeros(self.block_size * head_dim, dtype=torch.long)
            ones = torch.ones(self.block_size, 1, head_dim, dtype=dtype)
            for entries, weight in (
                (torch.arange(self.block_size, dtype=dtype).view(-1, 1, 1) * ones, head_dim),
                (torch.arange(head_dim, dtype=dtype).view(1, 1, -1) * ones, 1),
            ):
                keys, values = self._halves(torch.zeros(1, 1, self.block_size, 2 * head_dim, dtype=dtype))
                self._pack((entries, entries), (keys, values), torch.arange(self.block_size), isa)
                packed_from += keys.flatten().float().long() * weight
            self.unpacking[key] = torch.argsort(packed_from)
        return self.unpacking[key]


class Paged(Layout):
    """FlashAttention and the Triton kernel on a GPU.

    In vLLM 0.24 a block is (2, block_size, kv_heads, head_dim); in 0.32 it is (kv_heads, block_size, 2 × head_dim),
    keys before values. Views keep the strides that the engine chose.
    """

    def write(self, cache: torch.Tensor, layer: Any, kv: KV, slots: torch.Tensor) -> None:
        keys_THD, values_THD = kv
        super().write(cache, layer, (keys_THD.contiguous(), values_THD.contiguous()), slots)

    def read(self, cache: torch.Tensor, layer: Any, block_ids: torch.Tensor, tokens: int) -> KV:
        keys, values = (view[block_ids].flatten(0, 1)[:tokens].contiguous() for view in self._views(cache))
        return keys, values

    @staticmethod
    def _views(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each (blocks, block_size, kv_heads, head_dim)."""
        if cache.dim() == 5:
            keys, values = cache.unbind(1)
        else:
            keys, values = cache.transpose(1, 2).chunk(2, dim=-1)
        return keys, values


def layout_for(layers: dict[str, torch.Tensor], config: VllmConfig) -> Layout:
    """The layout of an engine's caches, given by layer name.

    Raises EngineError for a kernel, a cache dtype or a block size that is not covered.
    """
    modules = config.compilation_config.static_forward_context
    kernels = {modules[name].get_attn_backend().get_name() for name in layers}
    if len(kernels) != 1 or not kernels <= set(COVERED):
        raise EngineError(
            f"The engine's attention kernels are {', '.join(sorted(kernels))}; covered: {', '.join(COVERED)}, one "
            "for all layers. Choose it by vLLM's attention backend setting."
        )
    if config.cache_config.cache_dtype != "auto":
        raise EngineError(f"A KV cache of {config.cache_config.cache_dtype} is not covered. Use kv_cache_dtype='auto'.")
    block_size = config.cache_config.block_size
    different = [name for name, cache in layers.items() if cache.shape[2] != block_size]
    if different:
        raise EngineError(
            f"The engine's blocks are of {block_size} tokens, but {layers[different[0]].shape[2]} for the attention "
            f"kernel of {different[0]}. Use a block_size that the kernel takes whole."
        )
    kind = CPUPacked if kernels == {"CPU_ATTN"} else Paged
    return kind(block_size)
