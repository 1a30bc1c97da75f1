"""vLLM with LMCache, where it is installed."""

from __future__ import annotations

import importlib.util
import os
from typing import ClassVar

from experiments.load_arms.cpu_offloading import CPUOffloading, host_gib
from kvmem.engines.vllm import VLLMBackend


class LMCache(CPUOffloading):
    """LMCache keeps chunks of 256 tokens in host memory, in as many GiB as kvmem has for files."""

    name: ClassVar[str] = "lmcache"
    arm: ClassVar[str] = "LMCache"
    place: ClassVar[int] = 12

    def unavailable(self) -> str:
        if importlib.util.find_spec("lmcache") is None:
            return "LMCache is not installed"
        return super().unavailable()

    def engine(self, shared: VLLMBackend) -> VLLMBackend:
        os.environ.setdefault("LMCACHE_LOCAL_CPU", "True")
        os.environ.setdefault("LMCACHE_CHUNK_SIZE", "256")
        os.environ["LMCACHE_MAX_LOCAL_CPU_SIZE"] = str(host_gib(shared))
        connector = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
        return shared.beside(kv_transfer_config=connector, async_scheduling=None)
