"""The lower bound for models that the exact count does not cover, compared with the FLOP that torch counts."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from experiments.performance_model.counted import CountedShape
from experiments.performance_model.roofline import DenseShape, Rates, Roofline, shape_of
from kvmem.errors import ModelError
from tests.helpers.architectures import OF_OTHER_SIZES, WITH_STATES, covered, tiny_architecture
from tests.helpers.tiny import tiny_backend

TOKENS = 64
SHARES = {"deepseek_v3": 0.7, "glm4_moe_lite": 0.7, "jamba": 0.9, "lfm2_moe": 0.9, "qwen3_next": 0.8, "zamba": 0.9}
"""How much of torch's count the products of the modules are at least, for prompts of 64 tokens."""


def counted_by_torch(model: PreTrainedModel) -> int:
    """With experts computed one after the other: torch does not count grouped products."""
    model = copy.deepcopy(model)
    with contextlib.suppress(ValueError):
        model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=True, logits_to_keep=1)
    return counter.get_total_flops()


@pytest.mark.parametrize("model_type", [name for name in covered(WITH_STATES | OF_OTHER_SIZES) if name in SHARES])
def test_the_bound_is_below_the_work_that_torch_counts(model_type: str) -> None:
    backend = tiny_architecture(model_type)
    shape = shape_of(backend.model_config)
    assert isinstance(shape, CountedShape)
    flop = counted_by_torch(backend.model)
    assert shape.least_flop(TOKENS) < flop
    assert SHARES[model_type] * flop < 2 * TOKENS * shape.body + 2 * shape.head <= flop


def test_of_a_covered_model_it_counts_the_same_weights_and_less_work() -> None:
    config = tiny_backend("qwen3").model_config
    dense, counted = DenseShape.of(config), CountedShape.of(config)
    assert (counted.weights, counted.body) == (dense.weights, dense.body_weights)
    assert counted.least_flop(TOKENS, 100) < dense.least_flop(TOKENS, 100)
    assert counted.prefill_bytes(TOKENS, 100, 2) == dense.prefill_bytes(TOKENS, 100, 2)
    assert set(counted.products.values()) <= set(dense.products.values())


def test_a_limit_without_all_flop_gives_no_share_of_the_peak() -> None:
    roofline = Roofline(Rates(1e12, 1e11, "float32", "test"), tiny_architecture("deepseek_v3").model_config)
    assert roofline.limit_s(TOKENS, 0) > 0 and roofline.mfu(TOKENS, 0, 1.0) is None


def test_a_model_that_cannot_be_made_is_refused_by_name() -> None:
    config = copy.deepcopy(tiny_backend("qwen3").model_config)
    config.model_type = "retired"
    config.__class__ = type("RetiredConfig", (type(config),), {})
    with pytest.raises(ModelError, match="retired"):
        shape_of(config)
