"""Tiny random models whose layers keep states, latents or indexer keys, and a reference without any cache."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvmem import KVCacheItem
from kvmem.cache import Contents, dynamic_cache
from kvmem.cache.layers import INDEXED_SINCE
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.models.loading import Loaded
from tests.helpers.tiny import tiny_backend

BASE = {
    "vocab_size": 49152,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 16,
}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
LATENT_MOE = {
    **LATENT,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
INDEXED = {**LATENT_MOE, "index_n_heads": 32, "index_head_dim": 16, "index_topk": 8}
"""With so many heads no two tokens have the same score. Of few heads all may score 0, and the choice among equals
varies with the number of tokens that a forward pass is given."""

WITH_STATES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], **MAMBA2},
    "falcon_h1": {"mamba_d_ssm": 64, **MAMBA2},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "shared_intermediate_size": 32,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        **MAMBA2,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "kimi_linear": {
        **LATENT_MOE,
        "num_experts": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_heads": 2,
        "linear_head_dim": 16,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1, **MOE},
    "minimax": {
        "head_dim": 8,
        "layer_types": ["full_attention", "linear_attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "block_size": 16,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 16,
        "head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
    },
    "olmo_hybrid": DELTA,
    "qwen3_5_moe_text": {"shared_expert_intermediate_size": 16, **MOE, **DELTA},
    "qwen3_5_text": DELTA,
    "qwen3_next": {"decoder_sparse_step": 1, "shared_expert_intermediate_size": 16, **MOE, **DELTA},
    "zamba": {
        "num_hidden_layers": 4,  # at least two that share a block
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 4,
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "mamba_headdim": 16,
        "num_key_value_heads": 4,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "chunk_size": 16,
        "num_mem_blocks": 1,
        "adapter_rank": 4,
    },
    "zaya": {},
}
"""Model type -> its tiny config."""
OF_OTHER_SIZES: dict[str, dict[str, Any]] = {
    "axk1": LATENT_MOE,
    "deepseek_v2": LATENT_MOE,
    "deepseek_v3": LATENT_MOE,
    "deepseek_v32": INDEXED,
    "falcon": {"multi_query": True, "new_decoder_architecture": False},
    "glm4_moe_lite": LATENT_MOE,
    "glm_moe_dsa": INDEXED,
    "hy_v4": INDEXED,
    "minicpm3": LATENT,
    "youtu": LATENT_MOE,
}
"""The same for models whose keys and values have other sizes than their config's names for them say: multi-head latent
attention, some with an indexer, and Falcon's one head of keys and values."""
GAIN = 6.0


SPARSE = ("deepseek_v32", "glm_moe_dsa", "hy_v4")
IS_SPARSE_COVERED = tuple(map(int, transformers.__version__.split(".")[:2])) >= INDEXED_SINCE


def shipped(model_types: dict[str, dict[str, Any]]) -> list[str]:
    """Those of the model types that the installed transformers has; older versions lack some."""
    return [model_type for model_type in sorted(model_types) if model_type in CONFIG_MAPPING]


def covered(model_types: dict[str, dict[str, Any]]) -> list[str]:
    """Those of the model types that the installed transformers computes rightly."""
    return [name for name in shipped(model_types) if IS_SPARSE_COVERED or name not in SPARSE]


@cache
def tiny_architecture(model_type: str) -> HFBackend:
    """A tiny model of the type with random weights, fp32, under the chat template; loaded once in a process."""
    fields = BASE | (WITH_STATES | OF_OTHER_SIZES)[model_type]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name and "embed" not in name:
                parameter.mul_(GAIN)
    return HFBackend(Loaded(model, tiny_backend("qwen3").tokenizer, f"random weights of a tiny {model_type}, seed 0"))


@torch.inference_mode()
def greedy_without_cache(backend: HFBackend, ids: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    """`tokens` greedy tokens, each by a forward pass over everything before it, up to an end token."""
    answer: list[int] = []
    for _ in range(tokens):
        logits_BTV = backend.model(input_ids=torch.tensor([[*ids, *answer]]), use_cache=False).logits
        token = int(logits_BTV[0, -1].argmax())
        if token in backend.end_tokens:
            break
        answer.append(token)
    return tuple(answer)


def copy_of_contents(item: KVCacheItem) -> list[Contents]:
    """A copy of everything that the item's layers keep."""
    return [
        {name: tensor.clone() for name, tensor in kept.items()} for kept in dynamic_cache.contents_of(item.kv_cache)
    ]


def has_contents(item: KVCacheItem, expected: list[Contents]) -> bool:
    """Whether the item's layers keep exactly these tensors, to the bit."""
    now = dynamic_cache.contents_of(item.kv_cache)
    return [tuple(kept) for kept in now] == [tuple(kept) for kept in expected] and all(
        torch.equal(kept[name], before[name]) for kept, before in zip(now, expected, strict=True) for name in kept
    )
