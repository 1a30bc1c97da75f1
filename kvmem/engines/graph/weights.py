"""The weights of a covered model for the fast engine: those with the same input are stacked.

The model keeps its own weights as views of these, so Hugging Face's forward pass still runs and nothing is
stored twice. A model that has them in one matrix already keeps that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from kvmem.engines.graph.families import Family


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
    input_norm: torch.Tensor | None
    mlp_norm: torch.Tensor | None
    post_attention_norm: torch.Tensor | None = None
    post_mlp_norm: torch.Tensor | None = None


@torch.no_grad()
def stack(model: PreTrainedModel, family: Family) -> list[LayerWeights]:
    """The weights of all layers, stacked. The parameters of `model` become views of them.

    A second call finds them stacked and copies nothing.
    """
    stacked = [_stack_layer(layer, family) for layer in model.get_decoder().layers]
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # the parts' memory, half of all weights, which torch would keep in small pieces
    return stacked


def _stack_layer(layer: Any, family: Family) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    out, down = attention.o_proj, mlp.down_proj
    if family.packed:
        qkv, qkv_bias = attention.qkv_proj.weight.detach(), _detached(attention.qkv_proj.bias)
        gate_up, gate_up_bias = mlp.gate_up_proj.weight.detach(), _detached(mlp.gate_up_proj.bias)
    else:
        qkv, qkv_bias = _beside(attention.q_proj, attention.k_proj, attention.v_proj)
        gate_up, gate_up_bias = _beside(mlp.gate_proj, mlp.up_proj)
    norms = {name: child.weight.detach() for name, child in attention.named_children() if name.endswith("_norm")}
    post_attention = layer.post_attention_layernorm.weight.detach()  # Llama's is before the MLP, whatever its name
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
        None if family.post_norms else layer.input_layernorm.weight.detach(),
        None if family.post_norms else post_attention,
        post_attention if family.post_norms else None,
        layer.post_feedforward_layernorm.weight.detach() if family.post_norms else None,
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
