"""The weights of a covered model for the fast engine: those with the same input are stacked.

The model keeps its own weights as views of these, so Hugging Face's forward pass still runs and nothing is
stored twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from kvmem.errors import ModelError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type`. SmolLM2 is a llama, and Qwen2.5 is a qwen2."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""RoPE types with constant frequencies. Those of "dynamic" and "longrope" change with the length of the text."""


class LayerWeights(NamedTuple):
    """One decoder layer. Matrices are (out, in). None if the model family has no such weight."""

    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None
    input_norm: torch.Tensor
    mlp_norm: torch.Tensor


def check_covered(model: PreTrainedModel) -> None:
    """Raises ModelError, naming the reason, for a model that the fast engine does not compute correctly."""
    config = model.config
    kind, rope = config.model_type, getattr(config, "rope_parameters", None) or {}  # some families have none
    reason = None
    if kind not in FAMILIES:
        reason = f"covers {', '.join(FAMILIES)}, and not {kind}"
    elif "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        kind == "mistral" and config.sliding_window is not None
    ):
        reason = f"covers full attention, and this {kind} has a sliding window of {config.sliding_window} tokens"
    elif config.hidden_act != "silu":
        reason = f"covers the activation silu, and this {kind} has {config.hidden_act}"
    elif rope.get("rope_type", "default") not in ROPE_TYPES:
        reason = f"covers rope_type {', '.join(ROPE_TYPES)}, and this {kind} has {rope['rope_type']}"
    elif odd := [name for name, module in model.named_modules() if _is_replaced(name, module)]:
        reason = f"covers plain linear layers, and {odd[0]} is a {type(model.get_submodule(odd[0])).__name__}"
    if reason is not None:
        raise ModelError(f"hf_graph does not cover {type(model).__name__}: it {reason}. Use backend=huggingface.")


def _is_replaced(name: str, module: nn.Module) -> bool:
    """Whether a projection is no longer a plain linear layer: it is quantized or has an adapter."""
    return name.endswith(("_proj", "lm_head")) and type(module) is not nn.Linear


@torch.no_grad()
def stack(model: PreTrainedModel) -> list[LayerWeights]:
    """The weights of all layers, stacked. The parameters of `model` become views of them.

    A second call finds them stacked and copies nothing.
    """
    stacked = [_stack_layer(layer) for layer in model.get_decoder().layers]
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # the parts' memory, half of all weights, which torch would keep in small pieces
    return stacked


def _stack_layer(layer: Any) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    out, down = attention.o_proj, mlp.down_proj
    qkv, qkv_bias = _beside(attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up, gate_up_bias = _beside(mlp.gate_proj, mlp.up_proj)
    norms = {name: child.weight.detach() for name, child in attention.named_children() if name.endswith("_norm")}
    return LayerWeights(
        qkv,
        qkv_bias,
        out.weight.detach(),
        _detached(out.bias),
        norms.get("q_norm"),
        norms.get("k_norm"),
        gate_up,
        gate_up_bias,
        down.weight.detach(),
        _detached(down.bias),
        layer.input_layernorm.weight.detach(),
        layer.post_attention_layernorm.weight.detach(),
    )


def _beside(*linears: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight = _one_tensor([linear.weight for linear in linears])
    return weight, None if linears[0].bias is None else _one_tensor([linear.bias for linear in linears])


def _one_tensor(parts: list[torch.Tensor]) -> torch.Tensor:
    """The concatenated parts. Each part becomes a view of the result."""
    first, rows = parts[0], sum(part.shape[0] for part in parts)
    if _lie_one_behind_the_other(parts):
        return first.detach().as_strided((rows, *first.shape[1:]), first.stride())
    joined = torch.cat([part.detach() for part in parts])
    for part, view in zip(parts, joined.split([part.shape[0] for part in parts]), strict=True):
        part.data = view
    return joined


def _lie_one_behind_the_other(parts: list[torch.Tensor]) -> bool:
    """Whether the parts are adjacent in one storage, in this order. A loader may have placed them otherwise."""
    ends = [part.data_ptr() + part.numel() * part.element_size() for part in parts]
    return (
        len({part.untyped_storage().data_ptr() for part in parts}) == 1
        and all(part.is_contiguous() for part in parts)
        and [part.data_ptr() for part in parts[1:]] == ends[:-1]
    )


def _detached(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach()
