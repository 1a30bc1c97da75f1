"""The fast engine beside eager Hugging Face on the same weights."""

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
class TierStore:
    """Where and how the engine runs. `tolerance`: how far its logits may be from eager Hugging Face's."""

    device: str
    dtype: torch.dtype
    attention: str
    tolerance: float
    compile: str = "auto"
    shape: str = SHAPES["qwen3"]


PLACES = {
    "cpu": TierStore("cpu", torch.float32, "auto", 1e-4),
    "gpu-fp32": TierStore("cuda", torch.float32, "sdpa", 1e-3, compile="none"),
    "gpu-bf16-torch_flash": TierStore("cuda", torch.bfloat16, "torch_flash", 0.04, compile="none"),
    "gpu-bf16-fastest": TierStore("cuda", torch.bfloat16, "auto", 0.2, shape="tiny_heads128"),
    "gpu-bf16-fastest-heads32": TierStore("cuda", torch.bfloat16, "auto", 0.04, compile="none"),
    "gpu-bf16-fastest-heads64": TierStore("cuda", torch.bfloat16, "auto", 0.15, shape="tiny_heads64", compile="none"),
}
"""The tiny model's logits have a standard deviation of 0.16, and 0.03 of bf16's rounding; those of tiny_heads128 0.32
and 0.13, of tiny_heads64 0.28 and 0.08. Graphs are captured in all places on a GPU. FlashAttention 3, the fastest, is
built for heads of 64 and up, and fills up those of 32."""

Open = Callable[..., HFGraphBackend]


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.gpu] if name != "cpu" else []) for name in PLACES],
)
def place(request: pytest.FixtureRequest) -> TierStore:
    if request.param != "cpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return PLACES[request.param]


@pytest.fixture(scope="module")
def eager(place: TierStore) -> HFBackend:
    """Eager Hugging Face, a tiny Qwen3."""
    return HFBackend(weights(place, place.shape))


@pytest.fixture(scope="module")
def open_engine(place: TierStore) -> Open:
    """Opens the fast engine on the weights of `eager`, with the given knobs."""

    def open_(shape: str = place.shape, **knobs: object) -> HFGraphBackend:
        given = {"attention": place.attention, "capacity_tokens": 2048, "pad_to": 8, "compile": place.compile} | knobs
        return HFGraphBackend(weights(place, shape), "chat", GraphConfig(**given))

    return open_


def weights(place: TierStore, shape: str) -> Loaded:
    made = loaded(shape)
    return replace(made, model=made.model.to(place.device, place.dtype))


def stored(backend: HFBackend, text: str) -> tuple[KVCacheMemory, KVCacheItem]:
    """A memory on `backend` with one item."""
    memory = memory_on(backend)
    item = memory.extract(text)
    memory.add(item)
    return memory, item


def prompt_of(held: int, new: int, seed: int = 0) -> TokenizedPrompt:
    """Token ids at random: `held` of a memory, `new` behind it."""
    ids = torch.randint(1000, 40000, (held + new,), generator=torch.Generator().manual_seed(seed)).tolist()
    return TokenizedPrompt(tuple(ids[:held]), tuple(ids[held:]))
