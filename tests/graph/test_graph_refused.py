"""Models that the fast engine does not compute correctly are refused by name."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from kvmem.engines.graph.families import FAMILIES, family_of
from kvmem.errors import ModelError

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 100,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 100}
FULL_AND_WINDOW = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}

FAMILY_REFUSED = {
    "gpt2": "does not cover the layers of gpt2",
    "gemma": "does not cover the layers of gemma",
    "gemma3_text": "layers of sliding_attention",
    "gpt_oss": "mixtures of experts",
    "llama4_text": "mixtures of experts",
    "qwen3_moe": "mixtures of experts",
    "deepseek_v3": "mixtures of experts",
    "minicpm3": "multi-head latent attention",
    "olmo_hybrid": "layers of linear_attention",
}
OPTION_REFUSED = [
    ("mistral", {"sliding_window": 24}, "sliding window of 24 tokens"),
    ("phi3", {"sliding_window": 24}, "sliding window of 24 tokens"),
    (
        "qwen3",
        {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 16},
        "sliding window of 16 tokens",
    ),
    ("exaone4", FULL_AND_WINDOW, "sliding window of 16 tokens"),
    ("exaone4", {"layer_types": ["full_attention"] * 2, "sliding_window": 16}, "sliding window of 16 tokens"),
    ("smollm3", FULL_AND_WINDOW | {"use_sliding_window": True}, "sliding window of 16 tokens"),
    ("qwen3", {"rope_parameters": DYNAMIC}, "this qwen3 has dynamic"),
    ("phi3", {"rope_parameters": LONG_ROPE}, "this phi3 has longrope"),
    ("phi3", {"rope_parameters": PARTIAL}, "rotates a part of each (partial_rotary_factor 0.5)"),
    ("granite", {"hidden_act": "gelu"}, "this granite has gelu"),
]


def config_of(family: str, **fields: object) -> PreTrainedConfig:
    sizes = GPT2 if family == "gpt2" else SMALL
    return AutoConfig.for_model(family, **(sizes | {"head_dim": 16} if family == "qwen3" else sizes) | fields)


def refusal(config: PreTrainedConfig) -> str:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=f"^hf_graph does not cover {type(model).__name__}: it ") as raised:
        family_of(model)
    assert str(raised.value).endswith("Use backend=huggingface.")
    return str(raised.value)


@pytest.mark.parametrize("family", FAMILY_REFUSED)
def test_another_family_is_refused_by_name(family):
    said = refusal(config_of(family))
    assert FAMILY_REFUSED[family] in said and family in said
    assert all(covered in said for covered in FAMILIES)


@pytest.mark.parametrize(("family", "fields", "reason"), OPTION_REFUSED)
def test_an_option_of_a_covered_family_is_refused_by_name(family, fields, reason):
    assert reason in refusal(config_of(family, **fields))


@pytest.mark.parametrize(("family", "name"), [("qwen3", "mlp.down_proj"), ("phi3", "self_attn.qkv_proj")])
def test_a_replaced_layer_is_refused(family, name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(family))
    name = f"model.layers.1.{name}"
    model.set_submodule(name, torch.nn.Sequential(model.get_submodule(name)))
    with pytest.raises(ModelError, match=f"{name} is a Sequential"):
        family_of(model)
