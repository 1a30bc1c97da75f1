"""Memories are injected from their files, which are in host memory when a load begins."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar

from experiments.load_arms.base import LoadArm, Reuse, Sent, more_than_memory, whole_memory_missed
from kvmem.cache import KVCacheItem
from kvmem.engines import Injectable
from kvmem.engines.vllm import VLLMBackend
from kvmem.errors import EngineError
from kvmem.prompt import TokenizedPrompt

LONGEST_PREFETCH_S = 300.0


class Injected(LoadArm):
    """Each request names its memory. Blocks that are not in the prefix cache are copied from host memory."""

    name: ClassVar[str] = "injected"
    arm: ClassVar[str] = "injected"
    place: ClassVar[int] = 3
    needs_files: ClassVar[bool] = True

    def prepare(self, engine: VLLMBackend, items: Sequence[KVCacheItem]) -> None:
        hold_in_host_memory(engine, items)
        engine.reset()

    def sent(self, prompt: TokenizedPrompt, view: Injectable) -> Sent:
        return Sent(prompt, view)

    def held_tokens(self, engine: VLLMBackend, prompt: TokenizedPrompt) -> int:
        return len(prompt.memory_ids)

    def wrong_hits(self, requests: Sequence[Reuse], block_tokens: int) -> list[str]:
        return more_than_memory(requests) + whole_memory_missed(requests)


def hold_in_host_memory(engine: VLLMBackend, items: Sequence[KVCacheItem]) -> None:
    """Has the files of all items read into the engine's host memory. Raises EngineError if they do not fit."""
    held = engine.prefetch(items)
    if held < len(items):
        raise EngineError(
            f"{len(items)} memories do not fit into host memory, {held} do. Raise backend.host_cache_gib."
        )
    ends = time.perf_counter() + LONGEST_PREFETCH_S
    while engine.host_cache().files < held:
        if time.perf_counter() > ends:
            raise EngineError(f"{held} memory files were not read in {LONGEST_PREFETCH_S:.0f} s. The disk is too slow.")
        time.sleep(0.005)
