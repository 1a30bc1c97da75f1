"""Measurements on a model at hand: what its layers keep, and whether it continues from its states in one step."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel

from kvmem.cache import RECURRENT, CacheLayout, Contents, dynamic_cache
from kvmem.models.single_pass import single_pass

PROBE_IDS = (1, 2, 3, 4)
CONTINUED_IDS = (3, 2)
PERTURBATION = 1000.0
"""By how many times its largest value a state is changed to see whether the next tokens depend on it."""
NOTICED = 1e-3
"""The share of the perturbation that arrives behind two tokens at least, in some element, where the state is used. Of
a state that is not used nothing arrives."""

_continues: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
_lock = threading.Lock()


def measured_layout(model: PreTrainedModel) -> CacheLayout | None:
    """What each layer keeps, by one forward pass of a few tokens; None where the fingerprint's own fields tell it.

    Raises ModelError for a model that keeps something that is not known here.
    """
    if model.device.type == "meta" or not _is_measured(model):
        return None
    return CacheLayout.of(dynamic_cache.contents_of(_probed(model)))


def layout_of(config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> CacheLayout:
    """What each layer of a model of this config keeps, without its weights: seconds for the largest models.

    Raises ModelError for a model that keeps something that is not known here.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return CacheLayout.of(dynamic_cache.contents_of(_probed(model)))


def _is_measured(model: PreTrainedModel) -> bool:
    """False for layers that keep keys and values alone if their sizes differ by layer, or each process has a share of
    the heads: neither is stated by a fingerprint."""
    if not dynamic_cache.keeps_keys_and_values_only(_text_config(model)):
        return True
    is_shared = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return dynamic_cache.has_equal_layers(_text_config(model)) and not is_shared


def continues_in_one_step(model: PreTrainedModel) -> bool:
    """Whether the model reads its states when several tokens follow them. It always does for one token at a time.

    transformers' Mamba layers (Jamba, Zamba) begin from zero when they are given more than one token. Measured once for
    a model, by three forward passes of a few tokens.
    """
    with _lock:
        if model not in _continues:
            _continues[model] = _reads_states(model)
        return _continues[model]


def _reads_states(model: PreTrainedModel) -> bool:
    """Whether what two tokens make of a recurrent state depends on it. Only the first layer that has one is changed:
    nothing before it depends on the change, and every layer with states is of the same kind."""
    contents = dynamic_cache.contents_of(_probed(model))
    recurrent = [(layer, name) for layer, kept in enumerate(contents) for name in kept if name.startswith(RECURRENT)]
    if not recurrent:  # convolutions read their state through the cache, which gives it to them
        return True
    layer, name = recurrent[0]
    by = PERTURBATION * (1.0 + float(contents[layer][name].abs().max()))
    before, after = (_continued(model, contents, added)[layer][name] for added in ({}, {(layer, name): by}))
    return float((after.double() - before.double()).abs().max()) > NOTICED * by


def _text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config of the language model, which may be inside of another one."""
    config: PreTrainedConfig = model.config.get_text_config(decoder=True)
    return config


def _probed(model: PreTrainedModel) -> DynamicCache:
    cache = dynamic_cache.empty(_text_config(model))
    single_pass(model, PROBE_IDS, cache)
    return cache


def _continued(
    model: PreTrainedModel, contents: list[Contents], added: Mapping[tuple[int, str], float]
) -> list[Contents]:
    """What the layers keep after two more tokens, with a number added to some states before."""
    changed = [
        {name: tensor.clone() + added.get((layer, name), 0.0) for name, tensor in kept.items()}
        for layer, kept in enumerate(contents)
    ]
    cache = dynamic_cache.from_contents(changed, _text_config(model), as_input=True)
    single_pass(model, CONTINUED_IDS, cache)
    return dynamic_cache.contents_of(cache)
