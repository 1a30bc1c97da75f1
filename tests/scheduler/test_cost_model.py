"""What prefilling costs, measured on a tiny model."""

from __future__ import annotations

import time

from kvmem.engines.huggingface.backend import HFBackend
from kvmem.scheduler.cost_model import ENOUGH_S, Costs


def test_a_slow_first_prefill_is_not_a_sample(qwen3: HFBackend) -> None:
    """Libraries that are loaded at the first use, kernels that are compiled: it is no measure of any later prefill."""
    waited: list[float] = []

    def first_is_slow(*_: object) -> None:
        if not waited:
            waited.append(1.2 * ENOUGH_S)
            time.sleep(waited[0])

    hook = qwen3.model.register_forward_pre_hook(first_is_slow)
    try:
        costs = Costs.measured(qwen3)
    finally:
        hook.remove()
    assert waited and costs.prefill_s(32) < ENOUGH_S / 2
    assert costs.saved_s(1000, 0.0) > 0
