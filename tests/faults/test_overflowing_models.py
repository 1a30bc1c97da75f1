"""A model that computes NaN or infinite keys or values: the build is refused by name, and nothing is stored."""

from __future__ import annotations

import math

import pytest
import torch

from kvmem.cache import layer_that_is_not_finite
from kvmem.engines.graph.backend import HFGraphBackend
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import ModelError
from tests.helpers.tiny import loaded, memory_on, pairs
from tests.scheduler.test_scheduler import MEMORIES, scheduler_on, use

ENGINES = pytest.mark.parametrize("engine", [HFBackend, HFGraphBackend])
BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
TEXT = pairs(1, 300)[0][0]
TURNS = [{"role": "user", "content": TEXT}]


def overflowing(engine: type[HFBackend], projection: str, bad: float) -> HFBackend:
    """An engine whose second layer has one bad weight. An infinite bias is as an overflow of float16."""
    model = loaded("tiny")
    attention = model.model.get_decoder().layers[1].self_attn
    with torch.no_grad():
        getattr(attention, projection).weight[0, 0] = bad
    return engine(model)


@ENGINES
@BAD
@pytest.mark.parametrize("projection", ["k_proj", "v_proj"])
def test_a_build_of_what_is_not_finite_is_refused(engine: type[HFBackend], projection: str, bad: float) -> None:
    memory = memory_on(overflowing(engine, projection, bad))
    for source in (TEXT, TURNS, [TEXT]):
        with pytest.raises(ModelError, match=r"layer 1.*nothing was stored.*bfloat16 or float32"):
            memory.extract(source)
    assert memory.get_all() == []


@ENGINES
def test_the_scheduler_counts_it_as_a_failed_build(engine: type[HFBackend]) -> None:
    scheduler = scheduler_on(overflowing(engine, "v_proj", math.inf))
    use(scheduler, MEMORIES[0], 6)
    scheduler.tick()
    assert "layer 1" in scheduler.failures["m0"].reason
    assert not scheduler.index.tiers() and not scheduler.items.used_bytes()["ram"]


@BAD
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [0, 1], ids=["keys", "values"])
def test_one_value_anywhere_is_found(dtype: torch.dtype, bad: float, kind: int) -> None:
    largest = torch.finfo(dtype).max
    for token in (0, 6):
        layers = [tuple(torch.full((1, 2, 7, 4), largest, dtype=dtype) for _ in "kv") for _ in range(3)]
        assert layer_that_is_not_finite(layers) is None
        layers[2][kind][0, 1, token, 3] = bad
        assert layer_that_is_not_finite(layers) == 2
        middle = [tuple(tensor[..., 1:6, :] for tensor in pair) for pair in layers]
        assert layer_that_is_not_finite(middle) is None
    assert layer_that_is_not_finite([(torch.empty(1, 2, 0, 4), torch.empty(1, 2, 0, 4))]) is None


@ENGINES
def test_a_build_on_a_base_is_looked_at_where_it_is_new(engine: type[HFBackend]) -> None:
    """The base was good; the token that follows it has an embedding that overflows."""
    model = loaded("tiny")
    backend = engine(model)
    memory = memory_on(backend)
    with torch.no_grad():
        bad = backend.tokenizer(" zebra", add_special_tokens=False).input_ids[-1]
        model.model.get_input_embeddings().weight[bad] = math.inf
    backend.adopt_model()
    base = memory.extract(TURNS)
    with pytest.raises(ModelError, match="layer 0"):
        memory.extract([{"role": "assistant", "content": "A zebra"}], base=base)
    more = memory.extract([{"role": "assistant", "content": "A lion"}], base=base)
    assert layer_that_is_not_finite([(layer.keys, layer.values) for layer in more.kv_cache.layers]) is None
