"""Fixtures: the fast engine, and eager Hugging Face on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from kvmem import KVCacheItem, KVCacheMemory
from kvmem.engines.graph.backend import HFGraphBackend
from kvmem.engines.graph.config import GraphConfig
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.models.loading import Loaded
from kvmem.prompt.template import TokenizedPrompt
from tests.helpers.tiny import SHAPES, loaded, memory_on


@dataclass(frozen=True)
class Setting:
    """Where and how the engine runs. `tolerance`: how far its logits may be from eager Hugging Face's."""

    device: str
    dtype: torch.dtype
    attention: str
    tolerance: float
    compile: str = "auto"
    shape: str = SHAPES["qwen3"]


SETTINGS = {
    "cpu": Setting("cpu", torch.float32, "auto", 1e-4),
    "gpu-fp32": Setting("cuda", torch.float32, "sdpa", 1e-3, compile="none"),
    "gpu-bf16-torch_flash": Setting("cuda", torch.bfloat16, "torch_flash", 0.04, compile="none"),
    "gpu-bf16-fastest": Setting("cuda", torch.bfloat16, "auto", 0.2, shape="tiny_heads128"),
    "gpu-bf16-fastest-heads32": Setting("cuda", torch.bfloat16, "auto", 0.04, compile="none"),
    "gpu-bf16-fastest-heads64": Setting("cuda", torch.bfloat16, "auto", 0.15, shape="tiny_heads64", compile="none"),
}
"""The tiny model's logits have a standard deviation of 0.16, and 0.03 of bf16's rounding; those of tiny_heads128 0.32
and 0.13, of tiny_heads64 0.28 and 0.08. Graphs are captured in all settings on a GPU. FlashAttention 3, the fastest,
is built for heads of 64 and up, and pads those of 32."""

Open = Callable[..., HFGraphBackend]


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.gpu] if name != "cpu" else []) for name in SETTINGS],
)
def setting(request: pytest.FixtureRequest) -> Setting:
    if request.param != "cpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return SETTINGS[request.param]


@pytest.fixture(scope="module")
def eager(setting: Setting) -> HFBackend:
    """Eager Hugging Face, a tiny Qwen3."""
    return HFBackend(weights(setting, setting.shape))


@pytest.fixture(scope="module")
def open_engine(setting: Setting) -> Open:
    """Opens the fast engine on the weights of `eager`, with the given knobs."""

    def open_(shape: str = setting.shape, **knobs: object) -> HFGraphBackend:
        given = {
            "attention": setting.attention,
            "capacity_tokens": 2048,
            "pad_to": 8,
            "compile": setting.compile,
        } | knobs
        return HFGraphBackend(weights(setting, shape), "chat", GraphConfig(**given))

    return open_


def weights(setting: Setting, shape: str) -> Loaded:
    made = loaded(shape)
    return replace(made, model=made.model.to(setting.device, setting.dtype))


def stored(backend: HFBackend, text: str) -> tuple[KVCacheMemory, KVCacheItem]:
    """A memory on `backend` with one item."""
    memory = memory_on(backend)
    item = memory.extract(text)
    memory.add(item)
    return memory, item


def prompt_of(held: int, new: int, seed: int = 0) -> TokenizedPrompt:
    """Random token ids: `held` of a memory, and `new` after it."""
    ids = torch.randint(1000, 40000, (held + new,), generator=torch.Generator().manual_seed(seed)).tolist()
    return TokenizedPrompt(tuple(ids[:held]), tuple(ids[held:]))
