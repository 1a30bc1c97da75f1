"""Fixtures of many tests: models that are loaded once in a session."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from kvmem import KVCacheMemory
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.engines.huggingface.config import HFConfig
from kvmem.models.loading import Loaded
from tests.helpers.tiny import SHAPES, copy_of, memory_on, pairs, same_bits, tiny_backend, with_template

torch.set_num_threads(min(2, torch.get_num_threads()))

# The experiments are not installed, they run from the checkout: commands that tests start in other folders find them.
CHECKOUT = str(Path(__file__).parents[1])
if CHECKOUT not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [CHECKOUT, os.environ.get("PYTHONPATH")]))


ENGINES = {"engine": "engine", "slow": "engine", "url": "server"}
"""Fixtures of tests/vllm that last a session -> the group of their tests."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers, one worker gets all tests of an engine, of a server, or of a cluster, so that each is
    started once. Large groups are taken first, and single tests last, so that the workers end at nearly the same time.

    A module with a costly fixture of its own marks itself as a group.
    """
    for item in items:
        if isinstance(item, pytest.Function) and item.path.parent.name == "vllm":
            for group in {ENGINES[name] for name in item.fixturenames if name in ENGINES}:
                item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish() -> None:
    """Leaves what is imported by now out of Python's garbage collections, each of which takes 0.4 s otherwise. The
    storage scenario collects before each of its steps."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], HFBackend]:
    """Family -> its tiny model with full attention, random weights, fp32, under the chat template."""
    return tiny_backend


@pytest.fixture(params=sorted(SHAPES), scope="session")
def family(request: pytest.FixtureRequest) -> HFBackend:
    """The tiny model of each family, as a parameter."""
    return tiny_backend(request.param)


@pytest.fixture(scope="session")
def qwen3() -> HFBackend:
    """One tiny model, for tests in which the family does not matter."""
    return tiny_backend("qwen3")


@pytest.fixture(scope="session")
def qwen3_plain(qwen3: HFBackend) -> HFBackend:
    return with_template(qwen3, "plain")


@pytest.fixture(scope="session")
def sliding(qwen3: HFBackend) -> HFBackend:
    """A tiny Mistral with a sliding window of 24 tokens, shorter than the memories of the tests."""
    config = MistralConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=49152,
        max_position_embeddings=4096,
        sliding_window=24,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "embed" not in name:
                parameter.mul_(12.0)
    return HFBackend(Loaded(model, qwen3.tokenizer, "random weights, seed 0"))


@pytest.fixture(scope="session")
def smollm2() -> HFBackend:
    """SmolLM2-135M-Instruct, fp32 on the CPU, under the chat template."""
    return HFBackend.open(HFConfig(device="cpu", dtype="float32"))


@pytest.fixture(scope="session")
def smollm2_plain(smollm2: HFBackend) -> HFBackend:
    return with_template(smollm2, "plain")


@pytest.fixture
def stored(qwen3: HFBackend) -> Iterator[KVCacheMemory]:
    """A memory with one item, which a wrong call must not change."""
    memory = memory_on(qwen3)
    ((text, _),) = pairs(1, characters=300, seed=7)
    item = memory.extract(text)
    memory.add(item)
    before = copy_of(item)
    yield memory
    assert memory.get_all() == [item] and same_bits(item, before)
