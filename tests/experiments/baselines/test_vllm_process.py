"""vLLM in a process of its own, as scenario=injection_cost runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.baselines import vllm_process
from kvmem.errors import EngineError
from kvmem.models import loading
from tests.vllm.conftest import skip_without_vllm


@pytest.fixture(autouse=True)
def _needs_vllm() -> None:
    skip_without_vllm()


def request(folder: str, **fields: object) -> vllm_process.Request:
    values = {
        "model": folder,
        "dummy_weights": True,
        "dtype": "float32",
        "vocab": 49152,
        "cells": [(256, 32), (512, 32)],
        "rounds": 3,
        "decode_tokens": 8,
    }
    return vllm_process.Request(**values | fields)


@pytest.mark.slow
def test_a_cold_prompt_a_prefix_hit_and_decoding(tmp_path: Path) -> None:
    config = loading.shape_config("qwen3-0.6b")
    config.num_hidden_layers, config.vocab_size, config.architectures = 1, 49152, ["Qwen3ForCausalLM"]
    config.layer_types = config.layer_types[:1]
    config.save_pretrained(tmp_path)
    reply = vllm_process.measure_in_process(request(str(tmp_path)), timeout_s=200)
    assert [(cell.context_tokens, cell.query_tokens) for cell in reply.cells] == [(256, 32), (512, 32)]
    for cell in reply.cells:
        assert len(cell.cold_all_s) == len(cell.hit_all_s) == 3
        assert cell.context_tokens - 128 < cell.cached_tokens <= cell.context_tokens
        assert min(cell.hit_all_s) < min(cell.cold_all_s)
    assert reply.decode_context_tokens == 544 and all(rate > 0 for rate in reply.decode_tokens_per_s_all)
    assert reply.cell(512, 32) is reply.cells[1] and reply.cell(512, 33) is None


def test_a_failure_raises_an_error_with_the_last_lines_of_the_output(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"vLLM's process failed: .*"):
        vllm_process.measure_in_process(request(str(tmp_path / "nothing")), timeout_s=100)
