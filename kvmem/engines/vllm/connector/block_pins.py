"""Blocks that traffic can't evict. The scheduler's half."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool


class Pinning:
    """A pin is one more reference on a block, as of a request that never ends: the engine's block pool hands out none
    that is referred to. What is pinned always leaves room for one request of the engine's whole window, so no request
    can wait for blocks that will never come free."""

    pool: BlockPool
    """The engine's, given once it exists (vLLM 0.24 to 0.32: `touch` and `free_blocks` count references)."""

    def __init__(self, window_blocks: int) -> None:
        self.window_blocks = window_blocks
        self.held: dict[str, tuple[int, ...]] = {}

    def hold(self, name: str, block_ids: Sequence[int]) -> str:
        """Pins blocks of a request that still has them. Returns why it was refused, or nothing."""
        if not block_ids:
            return "It is shorter than one block of the engine's prefix cache, which holds whole blocks only."
        if any(self.pool.blocks[block_id].block_hash is None for block_id in block_ids):
            return "The engine's prefix cache does not hold it. Start the engine with enable_prefix_caching."
        others = {block_id for kept, ids in self.held.items() if kept != name for block_id in ids}
        added, total = len(set(block_ids) - others), self.pool.num_gpu_blocks - 1  # one is the pool's own
        if len(others) + added > total - self.window_blocks:
            return (
                f"It needs {added} blocks more than the {len(others)} pinned, and of the engine's {total} blocks "
                f"{self.window_blocks} stay free for a request of the whole window. Unpin another memory, or give the "
                "engine a larger kv_cache_gib or a shorter max_model_len."
            )
        self.pool.touch([self.pool.blocks[block_id] for block_id in block_ids])
        self.release([name])  # pinned again: the new reference is there before the old one goes
        self.held[name] = tuple(block_ids)
        return ""

    def release(self, names: Iterable[str]) -> None:
        """Lets go of what these names pinned: the last blocks are evicted first, as those of a request."""
        for name in names:
            block_ids = self.held.pop(name, ())
            self.pool.free_blocks([self.pool.blocks[block_id] for block_id in reversed(block_ids)])
