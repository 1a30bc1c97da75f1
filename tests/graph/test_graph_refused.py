"""Models that the fast engine does not compute correctly are refused by name."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig, Phi3Config, Qwen3Config

from kvmem.engines.graph.weights import check_covered
from kvmem.errors import ModelError


def refused(config) -> str:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError) as raised:
        check_covered(model)
    assert str(raised.value).endswith("Use backend=huggingface.")
    return str(raised.value)


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 100,
    "pad_token_id": 0,
}


def test_other_architectures_are_refused_by_name():
    assert "Phi3ForCausalLM: it covers llama, mistral, qwen2, qwen3" in refused(Phi3Config(**SMALL))
    without_rope = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100)
    assert "GPT2LMHeadModel: it covers" in refused(without_rope)
    assert "sliding window of 24 tokens" in refused(MistralConfig(sliding_window=24, **SMALL))
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "this qwen3 has dynamic" in refused(Qwen3Config(rope_parameters=rope, head_dim=16, **SMALL))
    assert "this qwen3 has gelu" in refused(Qwen3Config(hidden_act="gelu", head_dim=16, **SMALL))
    windows = Qwen3Config(use_sliding_window=True, sliding_window=16, max_window_layers=1, head_dim=16, **SMALL)
    assert "sliding window of 16 tokens" in refused(windows)


def test_a_replaced_layer_is_refused(tiny):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(head_dim=16, **SMALL))
    model.model.layers[1].mlp.down_proj = torch.nn.Sequential(model.model.layers[1].mlp.down_proj)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj is a Sequential"):
        check_covered(model)
