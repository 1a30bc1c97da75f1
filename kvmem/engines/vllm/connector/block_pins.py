"""Blocks that the engine does not evict; used in the scheduler."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool


class BlockPins:
    """Pins by name. A pin is one more reference on each block, as of a request that never ends: the engine's block pool
    does not evict blocks that have references.

    Enough blocks stay unpinned for one request of the engine's whole window, so no request waits forever for blocks.
    """

    pool: BlockPool
    """The engine's pool, set when it exists. In vLLM 0.24 to 0.32, `touch` and `free_blocks` count references."""

    def __init__(self, window_blocks: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.window_blocks = window_blocks
        self.clock = clock
        self.pinned: dict[str, tuple[int, ...]] = {}
        self.ends: dict[str, float] = {}
        """When a pin ends by itself, in seconds of the clock; infinity if it does not."""
        self.held: dict[str, tuple[int, ...]] = {}
        """Blocks that are being copied."""

    def pin(self, name: str, block_ids: Sequence[int], ttl_s: float = math.inf) -> str:
        """Pins blocks of a request that still has them. Returns why they can't be pinned, or ""."""
        if not block_ids:
            return "It is shorter than one block of the engine's prefix cache, which holds whole blocks only."
        if any(self.pool.blocks[block_id].block_hash is None for block_id in block_ids):
            return "The engine's prefix cache does not hold it. Start the engine with enable_prefix_caching."
        others = {block_id for other, ids in self.pinned.items() if other != name for block_id in ids}
        added, total = len(set(block_ids) - others), self.pool.num_gpu_blocks - 1  # the pool reserves one
        if len(others) + added > total - self.window_blocks:
            return (
                f"It needs {added} blocks more than the {len(others)} pinned, and of the engine's {total} blocks "
                f"{self.window_blocks} stay free for a request of the whole window. Unpin another memory, or give the "
                "engine a larger kv_cache_gib or a shorter max_model_len."
            )
        self.pool.touch([self.pool.blocks[block_id] for block_id in block_ids])
        self.release([name])  # if it was pinned before: the new references exist before the old ones are released
        self.pinned[name] = tuple(block_ids)
        self.ends[name] = self.clock() + ttl_s
        return ""

    def release(self, names: Iterable[str]) -> None:
        """Releases these pins. Their last blocks are evicted first, as those of a request."""
        for name in names:
            self.ends.pop(name, None)
            block_ids = self.pinned.pop(name, ())
            self.pool.free_blocks([self.pool.blocks[block_id] for block_id in reversed(block_ids)])

    def hold(self, name: str, block_ids: Sequence[int]) -> None:
        """Keeps blocks of a running request until `let_go(name)`, for the moments in which they are copied."""
        self.pool.touch([self.pool.blocks[block_id] for block_id in block_ids])
        self.held[name] = tuple(block_ids)

    def let_go(self, name: str) -> None:
        block_ids = self.held.pop(name, ())
        self.pool.free_blocks([self.pool.blocks[block_id] for block_id in reversed(block_ids)])

    def release_ended(self) -> None:
        """Releases the pins whose time is over."""
        if self.ends and min(self.ends.values()) <= (now := self.clock()):
            self.release([name for name, ends in self.ends.items() if ends <= now])

    def remaining_s(self) -> dict[str, float | None]:
        """All pins, with the seconds until each ends by itself; None if it does not."""
        now = self.clock()
        return {name: None if math.isinf(ends) else ends - now for name, ends in self.ends.items()}
