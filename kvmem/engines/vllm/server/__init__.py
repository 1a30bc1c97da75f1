"""A vLLM server with memories: starting it (`serve`), and using it from a client (`backend`)."""

from kvmem.engines.vllm.server.backend import VLLMServerBackend

__all__ = ["VLLMServerBackend"]
