"""The memory is text of every prompt, and the engine reuses the blocks that are still in its prefix cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from experiments.load_arms.base import LoadArm, Reuse, Sent, more_than_memory
from experiments.measurement import Trace, ttft
from experiments.results import NATIVE
from kvmem.cache import KVCacheItem
from kvmem.engines import Injectable
from kvmem.engines.vllm import VLLMBackend
from kvmem.prompt import TokenizedPrompt


class PrefixCache(LoadArm):
    """vLLM's own prefix cache, on the engine that injects: it names no memory, so kvmem does nothing for it."""

    name: ClassVar[str] = "prefix_cache"
    arm: ClassVar[str] = NATIVE
    place: ClassVar[int] = 1
    is_peer: ClassVar[bool] = True

    def sent(self, prompt: TokenizedPrompt, view: Injectable) -> Sent:
        return Sent(TokenizedPrompt((), prompt.ids))

    def prepare_alone(self, engine: VLLMBackend, item: KVCacheItem) -> None:
        ttft.fill_prefix_cache(engine, item.metadata.tokens.token_ids)

    def held_tokens(self, engine: VLLMBackend, prompt: TokenizedPrompt) -> int:
        return ttft.whole_blocks(engine, len(prompt.memory_ids))

    def trace(self, engine: VLLMBackend, prompt: TokenizedPrompt, view: Injectable, steps: int) -> Trace:
        return ttft.native_trace(engine, prompt, steps)

    def wrong_hits(self, requests: Sequence[Reuse], block_tokens: int) -> list[str]:
        injected = any(one.injected_tokens for one in requests)
        return more_than_memory(requests) + ([f"tokens of the {self.arm} were injected"] if injected else [])
