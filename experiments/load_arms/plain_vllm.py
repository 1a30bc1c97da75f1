"""vLLM without kvmem, with its own defaults: what its users have today."""

from __future__ import annotations

from typing import ClassVar

import torch

from experiments.load_arms.prefix_cache import PrefixCache
from kvmem.engines.vllm import VLLMBackend


class PlainVLLM(PrefixCache):
    """vLLM's prefix cache on an engine without a connector, which may schedule asynchronously."""

    name: ClassVar[str] = "plain_vllm"
    arm: ClassVar[str] = "vLLM alone"
    place: ClassVar[int] = 10
    own_engine: ClassVar[bool] = True

    def unavailable(self) -> str:
        return "" if torch.cuda.is_available() else "on a CPU it is the native hit: vLLM schedules synchronously there"

    def engine(self, shared: VLLMBackend) -> VLLMBackend:
        return shared.beside(kv_transfer_config=None, async_scheduling=None)
