"""The engine adapters of a measurement, which dispatch on the engine's class."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from experiments.measurement import reference
from experiments.measurement.engine_adapters import embedding_of, engine_conditions, reference_forward
from experiments.measurement.witness import Witness
from kvmem.cache import dynamic_cache
from kvmem.engines.base import MeasuredBackend
from kvmem.engines.graph.backend import HFGraphBackend
from kvmem.engines.graph.config import GraphConfig
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.engines.vllm.backend import VLLMBackend
from kvmem.errors import ConfigError
from kvmem.prompt import TokenizedPrompt
from tests.helpers.tiny import SHAPES, last_logits, loaded


@pytest.fixture(scope="module")
def fast() -> HFGraphBackend:
    return HFGraphBackend(loaded(SHAPES["qwen3"]), "chat", GraphConfig(capacity_tokens=512))


def test_the_reference_gives_the_logits_and_the_kv_of_the_whole_prompt(qwen3: HFBackend, fast: HFGraphBackend) -> None:
    ids = tuple(range(100, 160))
    right_V = last_logits(qwen3, ids)
    cache = DynamicCache(config=qwen3.model_config)
    qwen3.extend(ids, cache)
    for backend in (qwen3, fast):
        forward = reference_forward(backend)
        found = forward.logits(ids, (7, 8, 9), None)
        assert found.steps == (0, 1, 2) and len(found.runs) == 3
        for run_SV in found.runs:
            torch.testing.assert_close(run_SV[0], right_V.float(), rtol=1e-4, atol=1e-4)
        assert forward.first_token(ids) == int(right_V.argmax())
        for layers in forward.keys_values(ids):
            for pair, right in zip(layers, dynamic_cache.layers_of(cache), strict=True):
                torch.testing.assert_close(pair[0], right[0][0], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(pair[1], right[1][0], rtol=1e-4, atol=1e-4)


def test_a_kernel_that_takes_no_long_prompt_is_left_out(qwen3: HFBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here every prompt counts as long, and a CPU has one of the kernels for long ones: its usual one."""
    monkeypatch.setattr(reference, "MATH_LIMIT_BYTES", 0)
    ids = tuple(range(100, 160))
    forward = reference.TransformersForward(qwen3.model)
    assert len(forward.logits(ids, (7, 8), None).runs) == len(forward.keys_values(ids)) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_the_kernels_for_long_prompts_differ_on_a_gpu() -> None:
    """Grouped queries, as today's models have: not every kernel takes them."""
    model = loaded(SHAPES["qwen3"]).model.to("cuda", torch.bfloat16)
    ids = tuple(100 + i % 400 for i in range(9000))
    scores = 4 * model.config.num_attention_heads * len(ids) ** 2
    assert scores > reference.MATH_LIMIT_BYTES
    found = reference.TransformersForward(model).logits(ids, (7,), None)
    assert len(found.runs) >= 3 and found.noise > 0


def test_a_witness_counts_the_tokens_that_enter_the_model(qwen3: HFBackend, fast: HFGraphBackend) -> None:
    with Witness.of(embedding_of(qwen3)) as witness:
        assert witness is not None
        qwen3.first_token(TokenizedPrompt((), (1, 2, 3)))
        assert witness.count == 3
    qwen3.first_token(TokenizedPrompt((), (1, 2, 3)))
    assert witness.count == 3
    with Witness.of(embedding_of(fast)) as none:
        assert none is None


def test_conditions_name_what_the_figures_depend_on(qwen3: HFBackend, fast: HFGraphBackend) -> None:
    assert engine_conditions(qwen3) == {"graphs": "none (eager)"}
    of_graph = engine_conditions(fast)
    assert of_graph["capacity_tokens"] == 512 and of_graph["left_out"].startswith("CUDA graphs")
    assert of_graph["warm_up"] == {"seconds": 0.0, "graphs": 0, "graph_bytes": 0}


def test_vllm_has_its_own_adapter() -> None:
    assert reference_forward.dispatch(VLLMBackend) is not reference_forward.dispatch(MeasuredBackend)
    assert engine_conditions.dispatch(VLLMBackend) is not engine_conditions.dispatch(MeasuredBackend)


def test_an_engine_without_an_adapter_is_refused_by_name() -> None:
    class Own(MeasuredBackend):
        name = "own"

    Own.__abstractmethods__ = frozenset()
    own = Own()
    assert engine_conditions(own) == {}
    with pytest.raises(ConfigError, match="backend=own has no independent forward"):
        reference_forward(own)
