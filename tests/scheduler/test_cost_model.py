"""What prefilling costs, measured on tiny models by their own engines."""

from __future__ import annotations

import time

import pytest

from kvmem.engines.graph.backend import HFGraphBackend
from kvmem.engines.graph.config import GraphConfig
from kvmem.engines.huggingface.backend import SAMPLING_S, HFBackend
from kvmem.errors import ConfigError
from kvmem.scheduler.cost_model import Costs
from tests.helpers.tiny import SHAPES, loaded


def test_a_slow_first_prefill_is_not_a_sample(qwen3: HFBackend) -> None:
    """Libraries that are loaded at the first use, kernels that are compiled: it is no measure of any later prefill."""
    waited: list[float] = []

    def first_is_slow(*_: object) -> None:
        if not waited:
            waited.append(1.2 * SAMPLING_S)
            time.sleep(waited[0])

    hook = qwen3.model.register_forward_pre_hook(first_is_slow)
    try:
        costs = Costs.measured(qwen3)
    finally:
        hook.remove()
    assert waited and costs.prefill_s(32) < SAMPLING_S / 2
    assert costs.saved_s(1000, 0.0) > 0


def test_costs_are_the_engines_own() -> None:
    """Not those of transformers' forward pass, where the engine has another."""
    fast = HFGraphBackend(loaded(SHAPES["qwen3"]), "chat", GraphConfig(capacity_tokens=400))
    forward_passes: list[object] = []
    hook = fast.model.register_forward_pre_hook(lambda *_: forward_passes.append(None))
    try:
        costs = Costs.measured(fast)
    finally:
        hook.remove()
    assert not forward_passes
    assert costs.prefill_s(384) > 0 and costs.kv_bytes_a_token == fast.fingerprint.kv_bytes(1)


def test_an_engine_with_little_room_says_that_costs_need_more_lengths() -> None:
    fast = HFGraphBackend(loaded(SHAPES["qwen3"]), "chat", GraphConfig(capacity_tokens=200))
    with pytest.raises(ConfigError, match="got 2"):
        Costs.measured(fast)
