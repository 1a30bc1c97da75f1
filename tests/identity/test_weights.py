"""Weights that are not parameters: two quantized models that differ have fingerprints that differ."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kvmem.cache.fingerprint import fingerprint_of, hash_weights
from tests.helpers.tiny import loaded


class PackedLinear(nn.Module):
    """A linear layer in the manner of GPTQ and AWQ: int4 values packed into an int32 buffer, with scales."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scales = weight.abs().amax(1, keepdim=True) / 7
        values = (weight / scales).round().clamp(-8, 7).to(torch.int32) + 8
        packed = torch.zeros(weight.shape[0], weight.shape[1] // 8, dtype=torch.int32)
        for i in range(8):
            packed |= values[:, i::8] << (4 * i)
        self.register_buffer("qweight", packed)
        self.register_buffer("scales", scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [((self.qweight >> (4 * i)) & 15) - 8 for i in range(8)]
        weight = torch.stack(parts, dim=-1).flatten(1).to(self.scales.dtype)
        return x @ (weight * self.scales).T


def packed(seed: int) -> nn.Module:
    """A tiny model whose projections are packed; everything else is the same for every seed."""
    model, other = loaded("tiny_llama").model, loaded("tiny_llama", seed=seed).model
    for layer, source in zip(model.get_decoder().layers, other.get_decoder().layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, PackedLinear(getattr(source.self_attn, name)))
    return model.eval()


def dynamic_int8(seed: int) -> nn.Module:
    """As `packed`, by torch's own dynamic quantization, which keeps weights in packed objects."""
    model, other = loaded("tiny_llama").model, loaded("tiny_llama", seed=seed).model
    for layer, source in zip(model.get_decoder().layers, other.get_decoder().layers, strict=True):
        layer.self_attn = source.self_attn
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize("quantized", [packed, dynamic_int8])
def test_two_quantized_models_differ_and_the_same_one_does_not(quantized):
    first, again, second = (hash_weights(quantized(seed)) for seed in (1, 1, 2))
    assert first == again != second


def test_a_quantized_model_is_not_the_model_that_it_was_made_of():
    tokenizer = loaded("tiny_llama").tokenizer
    whole = fingerprint_of(loaded("tiny_llama", seed=1).model, tokenizer, "")
    assert whole.difference(fingerprint_of(packed(1), tokenizer, "")).startswith("weights")


def test_buffers_that_are_not_saved_do_not_count():
    """Rotary frequencies are computed on the device, where their last bit may differ: they follow from the config."""
    model = loaded("tiny_llama").model
    before = hash_weights(model)
    rotary = model.get_decoder().rotary_emb
    rotary.inv_freq = torch.nextafter(rotary.inv_freq, torch.full_like(rotary.inv_freq, 9.0))
    assert hash_weights(model) == before
