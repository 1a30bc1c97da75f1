"""vLLM engines. vLLM is imported only below this package, and only when an engine starts.

`backend` runs an engine in this process, and `server/` is a client of vLLM's HTTP server. Both derive from the
`FileInjectingEngine` of `file_injection`. `connector/` runs inside vLLM and moves keys and values between its blocks
and files.
"""

from kvmem.engines.vllm.backend import VLLMBackend
from kvmem.engines.vllm.file_view import FileView
from kvmem.engines.vllm.launch import CPU_KV_CACHE_GIB, ENVIRONMENT
from kvmem.engines.vllm.open_loop import Arrival, EngineSteps, Limit, OpenLoop, Served
from kvmem.engines.vllm.requests import EngineRequest, GenerationRequest, VLLMGeneration

__all__ = [
    "CPU_KV_CACHE_GIB",
    "ENVIRONMENT",
    "Arrival",
    "EngineRequest",
    "EngineSteps",
    "FileView",
    "GenerationRequest",
    "Limit",
    "OpenLoop",
    "Served",
    "VLLMBackend",
    "VLLMGeneration",
]
