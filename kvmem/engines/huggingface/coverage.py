"""Which models the engine covers: causal ones that keep what follows from a text in a cache.

A model is tried out when it is opened. What is not covered is refused there, by name, and not later by an error of
Python's. There is no list of model families, so a new one needs no change here.
"""

from __future__ import annotations

import inspect

import torch
from transformers import DynamicCache, PreTrainedModel

from kvmem.cache import dynamic_cache, underlying
from kvmem.errors import ModelError

PROBE_TOKENS = 4
"""The length of the texts that are tried."""
CAUSAL_TOLERANCE, CAUSAL_UNITS = 0.01, 64
"""By how much of their spread logits may change with a later token, and by how many units in the last place of the
largest: the smaller one. In a causal model only rounding changes them; in another one with small weights, little."""

_FORWARD_ERRORS = (TypeError, ValueError, LookupError, AttributeError, AssertionError, NotImplementedError)
"""What the forward pass of a model raises for arguments or a cache that it does not take. It is foreign code."""

_ANOTHER = "Use a causal language model with attention in its layers."


def check_covered(model: PreTrainedModel) -> None:
    """Raises ModelError, with the reason and the way out, for a model whose memories would not be exact.

    Costs four forward passes of at most four tokens.
    """
    inside = underlying(model)
    if inside.config.is_encoder_decoder:
        raise _refusal(inside, "is an encoder-decoder, whose prompt and answer are two sequences", _ANOTHER)
    if not inside.can_generate():
        raise _refusal(inside, "has no language head, as a classifier or an encoder", "Load the causal model of it.")
    if "past_key_values" not in inspect.signature(inside.forward).parameters:
        reason = "takes no past_key_values, as a state-space model or one without a cache"
        raise _refusal(inside, reason, _ANOTHER)
    config = inside.config.get_text_config(decoder=True)
    for field in ("num_hidden_layers", "num_attention_heads"):
        if getattr(config, field, None) is None:
            raise _refusal(inside, f"is not one stack of decoder layers (its config states no {field})", _ANOTHER)
    dynamic_cache.check_layer_kinds(config)
    ids = list(range(1, PROBE_TOKENS + 1))
    cache, half = dynamic_cache.empty(config), PROBE_TOKENS // 2
    _tried(model, inside, ids[:half], cache)
    _tried(model, inside, ids[half:], cache)
    if (fault := dynamic_cache.layout_fault(cache, PROBE_TOKENS)) is not None:
        raise _refusal(inside, fault, _ANOTHER)
    before_TV, changed_TV = (
        _tried(model, inside, [*ids[:-1], last], dynamic_cache.empty(config))[:-1] for last in (ids[-1], ids[0])
    )
    difference = float((changed_TV - before_TV).abs().max())
    rounding = CAUSAL_UNITS * torch.finfo(model.dtype).eps * float(before_TV.abs().max())
    if not model.training and difference > min(CAUSAL_TOLERANCE * float(before_TV.std()), rounding):
        raise _refusal(
            inside,
            "is not causal: a later token changes what is computed of earlier ones",
            "If it was trained as a decoder, set is_decoder=true in its config. If it is quantized with one scale for "
            "the activations of all tokens, quantize its weights only.",
        )


@torch.inference_mode()
def _tried(model: PreTrainedModel, inside: PreTrainedModel, ids: list[int], cache: DynamicCache) -> torch.Tensor:
    """The logits of each token, (tokens, vocab), fp32. Raises ModelError if the forward pass takes no such cache."""
    ids_1T = torch.tensor([ids], device=model.device)
    try:
        logits_1TV: torch.Tensor = model(input_ids=ids_1T, past_key_values=cache, use_cache=True).logits
    except _FORWARD_ERRORS as error:
        said = (str(error).strip().splitlines() or ["no message"])[0]
        reason = f"takes no text alone with a DynamicCache ({type(error).__name__}: {said})"
        raise _refusal(inside, reason, _ANOTHER) from error
    return logits_1TV[0].float()


def _refusal(model: PreTrainedModel, reason: str, way_out: str) -> ModelError:
    kind = f"{type(model).__name__} (model_type {model.config.model_type})"
    return ModelError(f"The Hugging Face engine does not cover {kind}: it {reason}. {way_out}")
