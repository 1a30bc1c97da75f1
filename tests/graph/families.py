"""Tiny models of the families that differ from Llama by a norm, a bias, a factor or a position, random in all of it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvmem.models.loading import PACKAGED, Loaded, load_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "pad_token_id": None,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    "granite": {
        "attention_bias": True,
        "mlp_bias": True,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.3,
        "embedding_multiplier": 6.0,
        "logits_scaling": 4.0,
    },
    "olmo2": {},
    "phi3": {"tie_word_embeddings": True},
    "seed_oss": {"head_dim": 16, "attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
}
"""Family -> fields of its config that the fast engine has to heed."""
GAIN = 8.0


@cache
def tokenizer() -> Any:
    return load_tokenizer(PACKAGED)


def family_model(family: str, head_dim: int = 16) -> Loaded:
    """A model of the family on the CPU in fp32, always the same. Norms and biases are random too."""
    sizes = SIZES | {"hidden_size": head_dim * SIZES["num_attention_heads"]}
    fields = sizes | VARIANTS[family]
    if "head_dim" in fields:
        fields["head_dim"] = head_dim
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, bos_token_id=1, eos_token_id=2, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            elif "embed" not in name:
                parameter.mul_(GAIN)
    return Loaded(model, tokenizer(), f"random weights of a tiny {family}")
