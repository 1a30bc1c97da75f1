"""What prefilling costs, measured on tiny models by their own engines."""

from __future__ import annotations

import time

import pytest

from kvmem.engines.graph.backend import HFGraphBackend
from kvmem.engines.graph.config import GraphConfig
from kvmem.engines.huggingface.backend import SAMPLING_S, HFBackend
from kvmem.errors import ConfigError
from kvmem.scheduler.cost_model import Costs, LoadEstimator
from kvmem.scheduler.planner import Planner
from kvmem.scheduler.policies import policy
from kvmem.tiers import LoadTimes
from tests.helpers.tiny import SHAPES, loaded


def test_a_slow_first_prefill_is_not_a_sample(qwen3: HFBackend) -> None:
    """The first prefill loads libraries and compiles kernels, so its time says nothing about later ones."""
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
    """They are not those of transformers' forward pass if the engine has another one."""
    fast = HFGraphBackend(loaded(SHAPES["qwen3"]), "chat", GraphConfig(capacity_tokens=400))
    forward_passes: list[object] = []
    hook = fast.model.register_forward_pre_hook(lambda *_: forward_passes.append(None))
    try:
        costs = Costs.measured(fast)
    finally:
        hook.remove()
    assert not forward_passes
    assert costs.prefill_s(384) > 0 and costs.kv_bytes_a_token == fast.fingerprint.kv_bytes(1)


def test_an_engine_with_a_short_window_says_that_costs_need_more_lengths() -> None:
    fast = HFGraphBackend(loaded(SHAPES["qwen3"]), "chat", GraphConfig(capacity_tokens=200))
    with pytest.raises(ConfigError, match="got 2"):
        Costs.measured(fast)


def test_one_estimator_for_the_planner_and_the_prefix_selector() -> None:
    """Given load times come before measured ones; a tier that nothing was loaded from counts as fast."""
    times = LoadTimes()
    for nbytes in (100, 200, 300):
        times.record("disk", nbytes, nbytes / 100)
        times.record("cold", nbytes, nbytes / 10)
    loads = LoadEstimator(Costs(0.0, 0.01, 0.0, 10, {"disk": 0.5}), times)
    assert loads.load_s("disk", 1000) == 500.0 and loads.is_given("disk")
    assert loads.load_s("cold", 1000) == pytest.approx(100.0) and not loads.is_given("cold")
    assert loads.load_s("ram", 1000) == 0.0
    estimate = loads.estimate("cold", 1000, 20_000)
    assert estimate.load_s == pytest.approx(100.0) and estimate.saved_s == pytest.approx(100.0) and estimate.pays


def test_a_planner_prices_a_group_by_measured_load_times() -> None:
    """A head needs no KV of its own where loading its group's KV is faster than the head's prefill."""
    for load_s, spared in ((1e-6, True), (100.0, False)):
        times = LoadTimes()
        times.record("disk", 1000, load_s)
        costs = Costs(0.0, 0.01, 0.0, 10)
        planner = Planner(policy("benefit_per_byte"), {"disk": 1 << 30}, costs, loads=LoadEstimator(costs, times))
        planner.sized("m0", 50)
        planner.joined("m0+m1", ["m0"])
        planner.sized("m0+m1", 100)
        planner.price({"m0+m1": "disk", "m0": "disk"})
        assert (planner.table.saved_s[planner.table.row_of["m0"]] == 0.0) == spared
