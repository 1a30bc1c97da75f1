"""Identifies the model that a cache is valid for: weights, dtype, RoPE, adapters, tokenizer and template, by hash.

A fingerprint names the weights, not the process that loaded them. It hashes each tensor's name, shape, dtype and a few
of its values, which takes seconds for 145 GB and gives the same result on every device.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvmem.cache.layers import KEYS, VALUES
from kvmem.cache.layout import CacheLayout, KeptTensor
from kvmem.cache.model_state import adapters_of, computed_tensors, tensors_within, underlying

SAMPLES_PER_TENSOR = 8
"""How many values of each weight tensor are hashed."""


class ModelFingerprint(BaseModel):
    """Identity of a loaded model. A cache fits a model only if every field but `origin` is equal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    """Of the first layer, if layers differ."""
    rope: dict[str, Any]
    config: str
    weights: str
    adapters: tuple[str, ...] = ()
    tokenizer: str
    template: str
    origin: str
    """Where the weights came from, in words: hub, folder, package (how quantized), random (shape, seed, device)."""
    layout: CacheLayout | None = Field(default=None, exclude_if=lambda layout: layout is None)
    """What each layer keeps, as measured, of a model whose layers do not all keep keys and values of `kv_heads` heads
    of size `head_dim`. It is written to a file only if it is set."""

    @property
    def cache_layout(self) -> CacheLayout:
        """What each layer keeps: `layout`, or what follows from the other fields."""
        return self.layout or CacheLayout(layers=(_keys_and_values(self),) * self.layers)

    @property
    def stored_kv_heads(self) -> int:
        """How many heads the stored keys have. Falcon's config states more than it keeps."""
        return self.kv_heads if self.layout is None else self.layout.layers[0][0].shape[1]

    @property
    def keeps_states(self) -> bool:
        """Whether a memory holds states, which belong to its last token, beside keys and values."""
        return self.layout is not None and self.layout.has_states

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of a memory of `tokens` tokens on all layers, with its states if there are any (`kv_bytes(0)`).

        0 if the layers are unknown (a served model).
        """
        if self.layout is not None:
            return self.layout.bytes_a_memory + tokens * self.layout.bytes_a_token
        if self.layers == 0:
            return 0
        itemsize: int = getattr(torch, self.dtype).itemsize
        return 2 * self.layers * self.kv_heads * self.head_dim * tokens * itemsize

    def shape_difference(self, contents: Sequence[Mapping[str, torch.Tensor]], shards: int = 1) -> str | None:
        """The first field in which tensors can't come from this model, as "field: X here, Y there"; None if they can.

        contents: what each layer keeps, by name. Keys and values are (1, kv_heads / shards, tokens, head_dim).
        """
        if self.layout is not None:
            return self.layout.difference(CacheLayout.of(contents))
        expected = {
            "layers": self.layers,
            "batch": 1,
            "kv_heads": self.kv_heads // shards,
            "head_dim": self.head_dim,
            "dtype": self.dtype,
        }
        for kept in contents:
            if tuple(kept) != (KEYS, VALUES):
                return f"kept: {KEYS}, {VALUES} here, {', '.join(kept) or 'nothing'} there"
            for tensor in kept.values():
                batch, kv_heads, _, head_dim = tensor.shape if tensor.dim() == 4 else (0, 0, 0, 0)
                actual = {
                    "layers": len(contents),
                    "batch": batch,
                    "kv_heads": kv_heads,
                    "head_dim": head_dim,
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                }
                for name, value in actual.items():
                    if value != expected[name]:
                        return f"{name}: {expected[name]} here, {value} there"
        return None if contents else f"layers: {self.layers} here, 0 there"

    def difference(self, other: ModelFingerprint) -> str | None:
        """The first field in which `other` is another model, as "field: X here, Y there"; None if it is the same."""
        for name in type(self).model_fields:
            ours, theirs = getattr(self, name), getattr(other, name)
            if name == "origin" or ours == theirs:
                continue
            difference = f"{name}: {ours} here, {theirs} there"
            if isinstance(ours, CacheLayout) and isinstance(theirs, CacheLayout):
                difference = ours.difference(theirs) or difference
            elif name == "layout":  # whole layouts are too long for a message
                difference = "layout: the layers keep different tensors"
            return f"{difference} (here {self.origin}; there {other.origin})"
        return None


def sha256(*parts: str | bytes) -> str:
    """The first 32 hexadecimal digits of the SHA-256 of the concatenated parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:32]


def hash_weights(model: nn.Module) -> str:
    """Hash of what the next forward pass computes with: name, shape, dtype and `SAMPLES_PER_TENSOR` evenly spread
    values of every parameter, persistent buffer and packed weight, those of adapters only where they have an effect.

    A tensor-parallel model has the hash of the whole model; every rank must call this.
    """
    parameters, others = computed_tensors(model)
    samples = [_sample(_whole(tensor)).float() for _, tensor in sorted(parameters.items())]
    by_device = [sample.cpu() for sample in samples] if len({s.device for s in samples}) > 1 else samples
    values = torch.cat(by_device).cpu()  # one transfer, not one for each tensor
    parts: list[str | bytes] = [*_parameter_signatures(parameters), values.numpy().tobytes()]
    for name, value in sorted(others.items()):
        for part in tensors_within(value):
            parts += [f"{name}:{tuple(part.shape)}:{part.dtype}", _bytes(_sample(_whole(part)))]
    return sha256(*parts)


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The fields `tokenizer` and `template` of a fingerprint."""
    tokens = (
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    )
    return {"tokenizer": sha256(tokens), "template": hash_template(tokenizer, {})}


def hash_template(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> str:
    """The field `template` of a fingerprint: hash of the chat template and of arguments that change a memory's tokens.

    arguments: JSON values. A tokenizer with several named templates has one hash of all of them.
    """
    template = tokenizer.chat_template or ""
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return sha256(text, json.dumps(arguments, sort_keys=True) if arguments else "")


def _parameter_signatures(parameters: Mapping[str, torch.Tensor]) -> list[str]:
    return [f"{name}:{tuple(tensor.shape)}:{tensor.dtype}" for name, tensor in sorted(parameters.items())]


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1)
    if not flat.numel():
        return flat
    at = torch.linspace(0, flat.numel() - 1, SAMPLES_PER_TENSOR, dtype=torch.float64).long()
    return flat[at.to(flat.device)]


def _bytes(sample: torch.Tensor) -> bytes:
    return sample.contiguous().cpu().view(torch.uint8).numpy().tobytes()


# Config fields that have no effect on the computed keys and values.
_IRRELEVANT_FIELDS = {
    "_name_or_path",
    "transformers_version",
    "architectures",
    "use_cache",
    "dtype",
    "torch_dtype",
    "distributed_config",
}


def fingerprint_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, origin: str, layout: CacheLayout | None = None
) -> ModelFingerprint:
    """The fingerprint of a loaded model with its tokenizer. `origin` describes where the weights came from.

    layout: what the layers keep, as measured. It is left out if it follows from the other fields.
    """
    fields = {k: v for k, v in model.config.to_dict().items() if k not in _IRRELEVANT_FIELDS}
    config = model.config.get_text_config(decoder=True)  # the model's own, unless it wraps a language model
    layer = config.per_layer_config[0] if getattr(config, "is_heterogeneous", False) else config
    heads = config.num_attention_heads
    found = ModelFingerprint(
        architecture=type(underlying(model)).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        layers=config.num_hidden_layers,
        kv_heads=getattr(layer, "num_key_value_heads", None) or heads,
        head_dim=getattr(layer, "head_dim", None) or config.hidden_size // heads,
        rope=json.loads(json.dumps(getattr(config, "rope_parameters", None) or {}, default=str)),
        config=sha256(json.dumps(fields, sort_keys=True, default=str)),
        # On the meta device there are no weights: an engine creates them itself, and `origin` says how.
        weights=(
            sha256(*_parameter_signatures(dict(model.named_parameters(remove_duplicate=False))), origin)
            if model.device.type == "meta"
            else hash_weights(model)
        ),
        adapters=adapters_of(model),
        layout=None,
        **hash_tokenizer(tokenizer),
        origin=origin,
    )
    if layout is None or all(layer == _keys_and_values(found) for layer in layout.layers):
        return found
    return found.model_copy(update={"layout": layout})


def _keys_and_values(model: ModelFingerprint) -> tuple[KeptTensor, ...]:
    """What a layer keeps of a model that has no layout of its own."""
    shape = (1, model.kv_heads, 1, model.head_dim)
    return tuple(KeptTensor(name=name, dtype=model.dtype, shape=shape) for name in (KEYS, VALUES))
