"""Weights that are not parameters: two quantized models that differ have fingerprints that differ."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from kvmem.cache.fingerprint import fingerprint_of, hash_weights
from kvmem.cache.model_state import ModelWatch
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import ModelChangedError, ModelError
from tests.helpers.tiny import loaded, memory_on


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


@dataclass
class QuantState:
    """As bitsandbytes keeps scales: in an object that is an attribute of the weight."""

    absmax: torch.Tensor
    nested: QuantState | None = None


def test_a_watch_sees_scales_in_objects_of_a_quantized_layer():
    layer = nn.Linear(4, 4)
    inner, of_layer = torch.ones(3), torch.ones(2)
    layer.weight.quant_state = QuantState(torch.ones(4), QuantState(inner))
    layer.state = QuantState(of_layer)
    for scale, name in ((inner, "weight"), (of_layer, "state")):
        watch = ModelWatch(layer)
        assert watch.changed() is None
        scale.mul_(2)
        assert watch.changed() == f"{name} was written in place"


def test_torchaos_weights_are_exact_and_a_changed_scale_is_refused():
    quantization = pytest.importorskip("torchao.quantization")
    model = loaded("tiny")
    quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
    backend = HFBackend(model)
    memory = memory_on(backend)
    item = memory.extract("The cellar holds four barrels of cider.")
    memory.add(item)
    query = "Where is the cider?"
    prompt = [{"role": "system", "content": item.metadata.source_text}, {"role": "user", "content": query}]
    injected = backend.generate(query, memory.get_cache(item.kv_cache_id), 8)
    assert injected.cached_tokens and injected.token_ids == backend.generate(prompt, None, 8).token_ids
    model.model.get_decoder().layers[0].mlp.up_proj.weight.scale.mul_(3)
    with pytest.raises(ModelChangedError, match=r"up_proj\.weight was written in place"):
        memory.get_cache(item.kv_cache_id)


def test_a_quantized_model_whose_activations_share_one_scale_is_refused():
    """A later token changes the scale, and with it what is computed of earlier ones."""
    model = loaded("tiny")
    torch.ao.quantization.quantize_dynamic(model.model, {nn.Linear}, dtype=torch.qint8, inplace=True)
    with pytest.raises(ModelError, match=r"not causal.*quantize its weights only"):
        HFBackend(model)
