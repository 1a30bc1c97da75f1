"""Which models kvmem's connector injects exactly: every layer keeps keys and values of each token, all of one size.

vLLM keeps such layers in one group of blocks. The config tells what a model keeps, so a model that is not covered is
refused before any weights are loaded.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from kvmem.cache import CacheLayout, dynamic_cache
from kvmem.errors import ModelError
from kvmem.models import measured_layout

OTHER_KEYS = frozenset({"llama4_text"})
"""Language models (`model_type`) of which vLLM permutes the weights of queries and keys when it loads them."""
TOKEN_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layers (`layer_types`) that keep keys and values of each token, in vLLM also of those beyond a window."""
_ANOTHER = "Use backend=huggingface."


def check_covered(config: PreTrainedConfig, window: int) -> None:
    """Raises ModelError, with the reason and the way out, for a model whose memories would not be injected exactly.

    window: the most tokens of prompt and answer together.
    """
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder or getattr(text, "num_hidden_layers", None) is None:
        raise _refusal(config, "is not one stack of decoder layers", "Use a causal language model.")
    if text.model_type in OTHER_KEYS:
        raise _refusal(config, "has keys whose elements vLLM orders otherwise than transformers does")
    if not _takes_keys_and_values(config):
        raise _refusal(config, "is a state-space model without keys and values", "Use a model with attention.")
    if others := {*(getattr(text, "layer_types", None) or ())} - TOKEN_LAYERS:
        raise _refusal(
            config,
            f"has layers of {', '.join(sorted(others))}, and vLLM keeps what is not keys and values of each token in "
            "blocks of their own",
        )
    if getattr(text, "kv_lora_rank", None) is not None:
        raise _refusal(config, "has multi-head latent attention, of which vLLM keeps latents in a layout of its own")
    if getattr(text, "num_kv_shared_layers", None):
        raise _refusal(config, "has layers that share the keys and values of another one")
    if not dynamic_cache.has_equal_layers(text) or _sizes_differ(text):
        raise _refusal(config, "has keys and values of different sizes")
    windows = dynamic_cache.windows_of(text)
    smallest = min((tokens for tokens in windows if tokens is not None), default=window)
    if None not in windows and smallest < window:
        raise _refusal(
            config,
            f"has a sliding window of {smallest} tokens in every layer, and vLLM drops what has left it",
            f"Use max_model_len={smallest}, or backend=huggingface.",
        )


def _takes_keys_and_values(config: PreTrainedConfig) -> bool:
    """Whether the model's forward pass takes a cache; that of a state-space model without attention does not."""
    kind = type(config)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:  # a language model inside of another one
        return True
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    return "past_key_values" in inspect.signature(model.forward).parameters


def _sizes_differ(text: PreTrainedConfig) -> bool:
    key_size, value_size = (getattr(text, name, None) for name in ("head_dim", "v_head_dim"))
    return bool(key_size and value_size and key_size != value_size)


def covered_layout(model: PreTrainedModel) -> CacheLayout | None:
    """What each layer keeps, as measured; None where the config tells it, or where the model has no weights.

    Raises ModelError as `check_covered`, for what only the measurement shows.
    """
    layout = measured_layout(model)
    shapes = {tensor.shape for layer in layout.layers for tensor in layer} if layout is not None else ()
    if layout is not None and (not layout.has_keys_and_values_only or len(shapes) > 1):
        raise _refusal(model.config, "keeps more than keys and values of one size for each token")
    return layout


def _refusal(config: PreTrainedConfig, reason: str, way_out: str = _ANOTHER) -> ModelError:
    name = ", ".join(config.architectures or ()) or type(config).__name__.removesuffix("Config")
    kind = f"{name} (model_type {config.model_type})"
    return ModelError(f"kvmem's connector for vLLM does not cover {kind}: it {reason}. {way_out}")
