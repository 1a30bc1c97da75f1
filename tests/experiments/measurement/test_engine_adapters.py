"""The engine adapters of a measurement, which dispatch on the engine's class."""

from __future__ import annotations

import pytest
import torch

from experiments.measurement.engine_adapters import engine_conditions, two_chunkings
from kvmem.engines.base import MeasuredBackend
from kvmem.engines.graph.backend import HFGraphBackend
from kvmem.engines.graph.config import GraphConfig
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.engines.vllm.backend import VLLMBackend
from kvmem.errors import ConfigError
from tests.helpers.tiny import SHAPES, last_logits, loaded


@pytest.fixture(scope="module")
def fast() -> HFGraphBackend:
    return HFGraphBackend(loaded(SHAPES["qwen3"]), "chat", GraphConfig(capacity_tokens=512))


def test_both_chunkings_give_the_same_prompt(qwen3: HFBackend, fast: HFGraphBackend) -> None:
    ids = tuple(range(100, 160))
    right_V = last_logits(qwen3, ids)
    for backend in (qwen3, fast):
        for logits_V in two_chunkings(backend, ids, 24):
            torch.testing.assert_close(logits_V, right_V, rtol=1e-4, atol=1e-4)


def test_conditions_name_what_the_figures_depend_on(qwen3: HFBackend, fast: HFGraphBackend) -> None:
    assert engine_conditions(qwen3) == {"graphs": "none (eager)"}
    of_graph = engine_conditions(fast)
    assert of_graph["capacity_tokens"] == 512 and of_graph["left_out"].startswith("CUDA graphs")
    assert of_graph["warm_up"] == {"seconds": 0.0, "graphs": 0, "graph_bytes": 0}


def test_vllm_has_its_own_adapter() -> None:
    assert two_chunkings.dispatch(VLLMBackend) is not two_chunkings.dispatch(MeasuredBackend)
    assert engine_conditions.dispatch(VLLMBackend) is not engine_conditions.dispatch(MeasuredBackend)


def test_an_engine_without_an_adapter_is_refused_by_name() -> None:
    class Own(MeasuredBackend):
        name = "own"

    Own.__abstractmethods__ = frozenset()
    own = Own()
    assert engine_conditions(own) == {}
    with pytest.raises(ConfigError, match="backend=own has no two_chunkings"):
        two_chunkings(own, (1, 2, 3), 1)
