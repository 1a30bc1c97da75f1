"""The model families that the fast engine covers, and how each differs from Llama: one line of a table for each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from kvmem.cache import foreign_code
from kvmem.errors import ModelError

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""RoPE types with constant frequencies. Those of "dynamic" and "longrope" change with the length of the text."""


@dataclass(frozen=True)
class Family:
    """How the layers of a family differ from Llama's: attention and a gated MLP, each behind a norm of its input."""

    packed: bool = False
    """The model itself has one matrix for queries, keys and values, and one for gate and up (Phi-3)."""
    post_norms: bool = False
    """Norms are behind attention and MLP, on what they add to the residual stream, and not before them (OLMo 2)."""
    norms_all_heads: bool = False
    """The norms of queries and keys are over all heads together, and not over each (OLMo 2)."""
    multipliers: bool = False
    """The config has four multipliers: of embeddings, attention scores, residuals and logits (Granite)."""
    skips_rope: bool = False
    """The config says which layers rotate queries and keys (SmolLM3)."""
    one_window: bool = False
    """A `sliding_window` in the config changes layers even if no `layer_types` names them."""


FAMILIES = {
    "exaone4": Family(post_norms=True, one_window=True),
    "granite": Family(multipliers=True),
    "llama": Family(),
    "mistral": Family(one_window=True),
    "olmo2": Family(post_norms=True, norms_all_heads=True),
    "phi3": Family(packed=True, one_window=True),
    "qwen2": Family(),
    "qwen3": Family(),
    "seed_oss": Family(),
    "smollm3": Family(skips_rope=True),
}
"""By `model_type`. SmolLM2 is a llama, Qwen2.5 is a qwen2, and Phi-4 is a phi3. EXAONE 4 is refused for any window:
its layers without one have no rotary embedding then."""

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Fields of configs that state a number of experts."""


def family_of(model: PreTrainedModel) -> Family:
    """The family of a covered model. Raises ModelError, naming the reason, for a model that is not covered."""
    config = model.config
    kind = config.model_type
    if kind not in FAMILIES:
        raise _refusal(model, f"{_what_differs(config)} It covers {', '.join(FAMILIES)}.")
    family, rope = FAMILIES[kind], getattr(config, "rope_parameters", None) or {}
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        family.one_window and config.sliding_window is not None
    ):
        raise _refusal(
            model, f"covers full attention, and this {kind} has a sliding window of {config.sliding_window} tokens."
        )
    if config.hidden_act != "silu":
        raise _refusal(model, f"covers the activation silu, and this {kind} has {config.hidden_act}.")
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        raise _refusal(model, f"covers rope_type {', '.join(ROPE_TYPES)}, and this {kind} has {rope['rope_type']}.")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        part = rope["partial_rotary_factor"]
        raise _refusal(
            model, f"rotates whole heads, and this {kind} rotates a part of each (partial_rotary_factor {part})."
        )
    for name, module in model.named_modules():
        if _is_replaced(name, module):
            raise _refusal(model, f"covers plain linear layers, and {name} is a {type(module).__name__}.")
    if own := [*foreign_code(model), *_attributes_of_its_own(model, family)]:
        raise _refusal(model, f"computes the layers itself, and this model has {own[0]}.")
    return family


def _attributes_of_its_own(model: PreTrainedModel, family: Family) -> Iterator[str]:
    """What a module computes with and the config does not say: it was assigned by hand."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scaling = config.attention_multiplier if family.multipliers else head_dim**-0.5
    for name, module in model.named_modules():
        if getattr(module, "variance_epsilon", config.rms_norm_eps) != config.rms_norm_eps:
            yield f"another variance_epsilon in {name} than its config"
        if name.endswith("self_attn") and not math.isclose(module.scaling, scaling):
            yield f"another scaling in {name} than its config"
        if name.endswith("self_attn") and not getattr(module, "is_causal", True):
            yield f"attention in {name} that is not causal"
        if name.endswith(("act_fn", "activation_fn")) and not isinstance(module, type(ACT2FN["silu"])):
            yield f"the activation {type(module).__name__} in {name}"


def _what_differs(config: PreTrainedConfig) -> str:
    """Why a family is not in the table, as far as its config tells."""
    kind = config.model_type
    text = config.get_text_config(decoder=True)
    others = sorted({*(getattr(text, "layer_types", None) or ())} - {"full_attention"})
    if any(getattr(text, field, None) for field in EXPERTS):
        return f"does not cover mixtures of experts, such as this {kind}."
    if getattr(text, "kv_lora_rank", None):
        return f"does not cover multi-head latent attention, which this {kind} has."
    if others:
        return f"covers layers of full attention, and this {kind} has layers of {', '.join(others)}."
    return f"does not cover the layers of {kind}."


def _is_replaced(name: str, module: nn.Module) -> bool:
    """Whether a projection is no longer a plain linear layer: it is quantized or has an adapter."""
    return name.endswith(("_proj", "lm_head")) and type(module) is not nn.Linear


def _refusal(model: PreTrainedModel, reason: str) -> ModelError:
    return ModelError(f"hf_graph does not cover {type(model).__name__}: it {reason} Use backend=huggingface.")
