"""What a cache is valid for: the weights, their dtype and RoPE, the tokenizer and its template, by hash.

A fingerprint names the weights, not the process that loaded them. Each tensor's name, shape and dtype and a few of its
values are hashed, which takes seconds for 145 GB and gives the same on any device.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLES_PER_TENSOR = 8


class ModelFingerprint(BaseModel):
    """Two caches may meet in one model only if every field but `origin` is equal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    rope: dict[str, Any]
    config: str
    weights: str
    adapters: tuple[str, ...] = ()
    tokenizer: str
    template: str
    origin: str
    """Where the weights came from, for people: hub, folder, packaged (how quantized), random (shape, seed, device)."""

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of `tokens` tokens, on all layers; 0 where the layers are not known (a served
        model)."""
        if self.layers == 0:
            return 0
        itemsize: int = getattr(torch, self.dtype).itemsize
        return 2 * self.layers * self.kv_heads * self.head_dim * tokens * itemsize

    def shape_difference(self, layers: Sequence[tuple[torch.Tensor, torch.Tensor]], shards: int = 1) -> str | None:
        """The first way in which tensors of unknown origin can't be of this model, as "field: ours, theirs".

        layers: (keys, values) of each layer, each (1, kv_heads / shards, tokens, head_dim). None: they may be.
        """
        ours = {
            "layers": self.layers,
            "batch": 1,
            "kv_heads": self.kv_heads // shards,
            "head_dim": self.head_dim,
            "dtype": self.dtype,
        }
        for tensor in (tensor for pair in layers for tensor in pair):
            batch, kv_heads, _, head_dim = tensor.shape if tensor.dim() == 4 else (0, 0, 0, 0)
            theirs = {
                "layers": len(layers),
                "batch": batch,
                "kv_heads": kv_heads,
                "head_dim": head_dim,
                "dtype": str(tensor.dtype).removeprefix("torch."),
            }
            for name, value in theirs.items():
                if value != ours[name]:
                    return f"{name}: {ours[name]} here, {value} there"
        return None if layers else f"layers: {self.layers} here, 0 there"

    def difference(self, other: ModelFingerprint) -> str | None:
        """The first field in which `other` is not the same model, as "field: ours, theirs"; None if it is the same."""
        for name in type(self).model_fields:
            ours, theirs = getattr(self, name), getattr(other, name)
            if name != "origin" and ours != theirs:
                return f"{name}: {ours} here, {theirs} there (here {self.origin}; there {other.origin})"
        return None


def sha256(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:32]


def hash_weights(model: PreTrainedModel) -> str:
    """Hash of every parameter's name, shape, dtype and `SAMPLES_PER_TENSOR` of its values, evenly spread.

    Of a model that is spread over processes the hash is that of the whole; each of them must call it.
    """
    names, samples = _names(model), []
    for _, tensor in sorted(model.named_parameters(remove_duplicate=False)):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        flat = whole.detach().reshape(-1)
        at = torch.linspace(0, flat.numel() - 1, SAMPLES_PER_TENSOR, dtype=torch.float64).long()
        samples.append(flat[at.to(flat.device)].float())
    by_device = [sample.cpu() for sample in samples] if len({s.device for s in samples}) > 1 else samples
    values = torch.cat(by_device).cpu()  # one transfer, not one a tensor
    return sha256(*names, values.numpy().tobytes())


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The fingerprint's fields `tokenizer` and `template`."""
    tokens = (
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    )
    return {"tokenizer": sha256(tokens), "template": sha256(tokenizer.chat_template or "")}


def _names(model: PreTrainedModel) -> list[str]:
    parameters = sorted(model.named_parameters(remove_duplicate=False))
    return [f"{name}:{tuple(tensor.shape)}:{tensor.dtype}" for name, tensor in parameters]


# Written by whoever saved the model, and without effect on a cache.
_WITHOUT_EFFECT = {
    "_name_or_path",
    "transformers_version",
    "architectures",
    "use_cache",
    "dtype",
    "torch_dtype",
    "distributed_config",
}


def fingerprint_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, origin: str) -> ModelFingerprint:
    """The fingerprint of a loaded model with its tokenizer; `origin` says in words where the weights came from."""
    config = model.config
    fields = {k: v for k, v in config.to_dict().items() if k not in _WITHOUT_EFFECT}
    heads = config.num_attention_heads
    return ModelFingerprint(
        architecture=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        rope=json.loads(json.dumps(getattr(config, "rope_parameters", None) or {}, default=str)),
        config=sha256(json.dumps(fields, sort_keys=True, default=str)),
        # Weights that an engine makes by itself are named by how it does.
        weights=sha256(*_names(model), origin) if model.device.type == "meta" else hash_weights(model),
        adapters=tuple(model.active_adapters()) if model._hf_peft_config_loaded else (),
        **hash_tokenizer(tokenizer),
        origin=origin,
    )
