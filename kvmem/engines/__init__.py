"""Engines: what builds memories from text and answers queries with them.

`Backend` is the interface that `KVCacheMemory` works with. `huggingface` runs transformers, `graph` is the fast engine
with CUDA graphs, and `vllm` drives vLLM in this process or as a server.
"""

from kvmem.engines.base import (
    ENGINES,
    Backend,
    BackendConfig,
    BetweenLayers,
    FileHandle,
    FirstToken,
    Injectable,
    MeasuredBackend,
    StoredFile,
    TensorParallelConfig,
    backend_class,
)
from kvmem.engines.generation import Generation, Sampling, Token, check_generation

__all__ = [
    "ENGINES",
    "Backend",
    "BackendConfig",
    "BetweenLayers",
    "FileHandle",
    "FirstToken",
    "Generation",
    "Injectable",
    "MeasuredBackend",
    "Sampling",
    "StoredFile",
    "TensorParallelConfig",
    "Token",
    "backend_class",
    "check_generation",
]
