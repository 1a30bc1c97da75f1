"""An engine's blocks of keys and values, turned into ours and back: (tokens, kv_heads, head_dim), after RoPE."""

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


class Layout(ABC):
    """The blocks of one engine. `cache`: one layer's tensor; `slots`: places of tokens, block × block_size + offset."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    def write(self, cache: torch.Tensor, layer: Any, kv: KV, slots: torch.Tensor) -> None:
        """Puts tokens at `slots`: `kv` is keys and values, each (tokens, kv_heads, head_dim), each token contiguous, on
        the cache's device and of its dtype. By the engine's own kernel: the call that stores what it computes."""
        layer.impl.do_kv_cache_update(layer, *kv, cache, slots)

    @abstractmethod
    def read(self, cache: torch.Tensor, layer: Any, block_ids: torch.Tensor, tokens: int) -> KV:
        """The first `tokens` tokens of these blocks, each (tokens, kv_heads, head_dim), contiguous copies."""

    def slots(self, block_ids: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """The slots of tokens `start` to `end` of a request with these blocks."""
        at = torch.arange(start, end, device=block_ids.device)
        return block_ids[at // self.block_size] * self.block_size + at % self.block_size


class CPUPacked(Layout):
    """vLLM's CPU attention: a block is (kv_heads, block_size, 2 × head_dim), its first half the keys, packed for the
    chip's matrix instructions, its second half the values, plain.

    How keys are packed differs from chip to chip, so it is not written down here but learned: the engine's own kernel
    packs a block whose entries say where they came from.
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
        """Where a plain block's entries lie in a packed one: packed.flatten()[unpacking] is (block_size, head_dim)."""
        key = (isa, head_dim, dtype)
        if key not in self.unpacking:
            if max(self.block_size, head_dim) > 256:
                raise EngineError(
                    f"Entries of blocks of {self.block_size} tokens with heads of {head_dim} can't be told apart: 256 "
                    "is the most. Use block_size=128."
                )
            came_from = torch.zeros(self.block_size * head_dim, dtype=torch.long)
            ones = torch.ones(self.block_size, 1, head_dim, dtype=dtype)
            for entries, weight in (
                (torch.arange(self.block_size, dtype=dtype).view(-1, 1, 1) * ones, head_dim),
                (torch.arange(head_dim, dtype=dtype).view(1, 1, -1) * ones, 1),
            ):
                keys, values = self._halves(torch.zeros(1, 1, self.block_size, 2 * head_dim, dtype=dtype))
                self._pack((entries, entries), (keys, values), torch.arange(self.block_size), isa)
                came_from += keys.flatten().float().long() * weight
            self.unpacking[key] = torch.argsort(came_from)
        return self.unpacking[key]


class Paged(Layout):
    """FlashAttention and Triton's kernel on a GPU. vLLM 0.24: a block is (2, block_size, kv_heads, head_dim); 0.32:
    (kv_heads, block_size, 2 × head_dim), keys before values. Views, so whatever strides the engine chose hold."""

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
    """The layout of an engine's caches. Raises EngineError for a kernel or cache dtype that is not covered."""
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
    other = [name for name, cache in layers.items() if cache.shape[2] != block_size]
    if other:
        raise EngineError(
            f"The engine's blocks are of {block_size} tokens, but {layers[other[0]].shape[2]} for the attention kernel "
            f"of {other[0]}. Use a block_size that the kernel takes whole."
        )
    kind = CPUPacked if kernels == {"CPU_ATTN"} else Paged
    return kind(block_size)
