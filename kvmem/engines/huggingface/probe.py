"""What a model computes of a few tokens, to tell whether it still is the same function."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Self

import torch
from transformers import PreTrainedModel

from kvmem.cache import dynamic_cache

TOKENS = 8
ROUNDING_UNITS, ROUNDING_LIMIT = 1000, 0.1
"""By how much another attention implementation may change a value: by so many units in the last place of the layer's
largest value, and at most by this share of it."""


@dataclass(frozen=True)
class Probe:
    """What each layer keeps (keys, values, states) and the last logits of `TOKENS` tokens, on the CPU."""

    attention: str | None
    results: list[torch.Tensor]

    @classmethod
    @torch.inference_mode()
    def of(cls, model: PreTrainedModel) -> Self:
        """Costs one forward pass."""
        config = model.config.get_text_config(decoder=True)
        cache = dynamic_cache.empty(config)
        ids_1T = torch.arange(1, TOKENS + 1, device=model.device)[None]
        logits_1TV = model(input_ids=ids_1T, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        tensors = [kept[name] for kept in dynamic_cache.contents_of(cache) for name in sorted(kept)]
        return cls(config._attn_implementation, [tensor.to("cpu", copy=True) for tensor in (*tensors, logits_1TV)])

    def differs(self, other: Probe) -> bool:
        """Whether any bit differs, or, under another attention implementation, more than rounding."""
        pairs = list(zip(self.results, other.results, strict=False))
        if len(self.results) != len(other.results) or any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
            return True
        same_attention = self.attention == other.attention
        return any(_bits(a) != _bits(b) and (same_attention or not _is_rounding(a, b)) for a, b in pairs)

    def digest(self) -> str:
        digest = hashlib.sha256()
        for tensor in self.results:
            digest.update(_bits(tensor))
        return digest.hexdigest()[:16]


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _is_rounding(a: torch.Tensor, b: torch.Tensor) -> bool:
    allowed = min(ROUNDING_UNITS * torch.finfo(a.dtype).eps, ROUNDING_LIMIT) * float(b.abs().max())
    return float((a.double() - b.double()).abs().max()) <= allowed
