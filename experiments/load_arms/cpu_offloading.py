"""vLLM with its own offloading of KV blocks to host memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from experiments.load_arms.prefix_cache import PrefixCache
from kvmem.cache import KVCacheItem
from kvmem.engines.vllm import VLLMBackend
from kvmem.prompt import TokenizedPrompt

DEFAULT_GIB = 8.0
"""Host memory for blocks where the configuration gives none for memory files."""


class CPUOffloading(PrefixCache):
    """Blocks that leave the GPU stay in host memory, in as many GiB as kvmem has for files (`backend.host_cache_gib`).

    A load begins with every memory in host memory, as in the arm `injected`.
    """

    name: ClassVar[str] = "cpu_offloading"
    arm: ClassVar[str] = "CPU offloading"
    place: ClassVar[int] = 11
    own_engine: ClassVar[bool] = True

    def unavailable(self) -> str:
        return "" if torch.cuda.is_available() else "vLLM offloads blocks of a GPU, and this machine has none"

    def engine(self, shared: VLLMBackend) -> VLLMBackend:
        return shared.beside(kv_transfer_config=None, async_scheduling=None, kv_offloading_size=host_gib(shared))

    def prepare(self, engine: VLLMBackend, items: Sequence[KVCacheItem]) -> None:
        engine.reset()
        for item in items:
            engine.first_token(TokenizedPrompt((), item.metadata.tokens.token_ids))
        engine.reset()


def host_gib(shared: VLLMBackend) -> float:
    """The host memory that each arm has for KV, in GiB."""
    return shared.config.host_cache_gib or DEFAULT_GIB
