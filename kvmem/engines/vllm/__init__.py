"""The vLLM engine in this process. vLLM is imported only below this package.

`backend` starts the engine, `connector/` runs inside vLLM and moves keys and values between its blocks and files, and
`server/` is the same engine behind vLLM's HTTP server.
"""

from kvmem.engines.vllm.backend import VLLMBackend
from kvmem.engines.vllm.launch import CPU_KV_CACHE_GIB, ENVIRONMENT
from kvmem.engines.vllm.open_loop import Arrival, Served, ServingEngine

__all__ = ["CPU_KV_CACHE_GIB", "ENVIRONMENT", "Arrival", "Served", "ServingEngine", "VLLMBackend"]
