"""What a model computes at this moment: its weights however they are kept, its adapters, and whether either changed.

A model object is not a fixed function. Adapters are switched and scaled, quantized layers keep their weights in
buffers or packed objects, and weights are loaded or trained in place. `computed_tensors` and `adapters_of` describe
what the next forward pass uses. `ModelWatch` notices in microseconds that something may have changed, without reading
a weight.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from kvmem.errors import ModelError

_BASE_PREFIX = "base_model.model."
"""What peft's wrapper puts before the names of the model that it wraps."""


def underlying(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside peft's wrapper; a model without one is returned as it is.

    Raises ModelError for prompt learning (prefix tuning, prompt tuning), which puts virtual tokens before every prompt.
    """
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        return model  # type: ignore[return-value] # what is loaded is a transformers model
    learned = [name for name, config in model.peft_config.items() if config.is_prompt_learning]
    if learned:
        raise ModelError(
            f"The adapter {learned[0]} is prompt learning ({model.peft_config[learned[0]].peft_type.value}): it puts "
            "virtual tokens before every prompt, which a stored prefix does not hold. Use an adapter that changes "
            "weights, such as LoRA, or merge it into the model."
        )
    base: PreTrainedModel = model.get_base_model()
    return base


def adapters_of(model: nn.Module) -> tuple[str, ...]:
    """The adapters whose effect the next forward pass computes beside the weights: name, kind and a hash of the scales.

    A disabled adapter has no effect, and neither has one that is merged: the weights hold it then.
    """
    effects: dict[str, dict[str, Any]] = {}
    for name, layer in _tuner_layers(model):
        for adapter in _computed(layer):
            effects.setdefault(adapter, {})[_plain(name)] = _knobs(layer, adapter)
        if layer.merged and layer.disable_adapters:  # peft takes it out of the weights at the next forward pass
            for adapter in layer.merged_adapters:
                effects.setdefault(f"{adapter} (merged and disabled)", {})[_plain(name)] = {}
    return tuple(f"{adapter}: {_digest(layers)}" for adapter, layers in sorted(effects.items()))


def computed_tensors(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(parameters, everything else that a state dict holds) that the next forward pass uses, by name.

    The second has the persistent buffers (GPTQ and AWQ keep weights there) and what quantized layers pack by themselves
    (`torch.ao`, bitsandbytes). Tensors of adapters without an effect are left out, and names are the base model's: with
    all adapters disabled the result is that of the model without them.
    """
    unused = tuple(_unused_prefixes(model))
    everything = dict(model.named_parameters(remove_duplicate=False))
    parameters = {name: tensor for name, tensor in everything.items() if _is_plain(tensor)}
    others = {name: value for name, value in model.state_dict().items() if name not in parameters}
    return _used(parameters, unused), _used(others, unused)


def tensors_within(value: Any) -> Iterator[torch.Tensor]:
    """The plain tensors of a stored value: of a tuple, a packed or quantized tensor, or a tensor subclass.

    Yields integers as they are stored, so that equal bits are equal. A value without tensors, such as a dtype, yields
    its text as bytes.
    """
    if isinstance(value, tuple | list):
        for part in value:
            yield from tensors_within(part)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from tensors_within(value[key])
    elif isinstance(value, torch.Tensor):
        if value.is_quantized:
            yield value.int_repr()
            if value.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
                yield torch.tensor([value.q_scale(), value.q_zero_point()], dtype=torch.float64)
            else:
                yield value.q_per_channel_scales()
                yield value.q_per_channel_zero_points()
        elif _is_plain(value):
            yield value.detach()
        else:  # a tensor subclass, such as torchao's, by torch's own protocol for them
            for name in value.__tensor_flatten__()[0]:  # type: ignore[attr-defined] # not declared on Tensor
                yield from tensors_within(getattr(value, name))
    elif value is not None:
        yield torch.frombuffer(bytearray(repr(value).encode() or b" "), dtype=torch.uint8)


class ModelWatch:
    """Notices that a model may no longer compute what it did when the watch was made.

    `changed` compares identities, version counters and addresses: some tens of microseconds, without reading a weight
    or waiting for a device. It does not see writes through `tensor.data`, which torch does not count.
    """

    def __init__(self, model: nn.Module) -> None:
        dicts: list[tuple[str, dict[str, Any]]] = []
        for name, module in model.named_modules():
            dicts += [(name, kind) for kind in (module._modules, module._parameters, module._buffers)]
        self._held_by_name = [(name, held, dict(held)) for name, held in dicts]
        self._empty = [held for _, held in dicts if not held]
        self._values = [held.values() for _, held in dicts if held]
        self._held = list(chain.from_iterable(self._values))
        self._single = [(i, value) for i, value in enumerate(self._held) if _is_tensor(value) and value.numel() == 1]
        names = [_joined(name, key) for name, held in dicts for key in held]
        attributes = [
            (_joined(name, key), value)
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if key not in _KEPT_BY_TORCH
        ]
        found = {
            id(tensor): (name, tensor)
            for name, value in (*zip(names, self._held, strict=True), *attributes)
            for tensor in _tensors_of(value)
            if not tensor.is_inference()
        }
        counted = list(found.values())
        self._names, self._tensors = [name for name, _ in counted], [tensor for _, tensor in counted]
        self._versions = list(map(_version, self._tensors))
        self._addresses = list(map(torch.Tensor.data_ptr, self._tensors))
        self._tuners = list(_tuner_layers(model))
        self._tuner_states = [_state(layer) for _, layer in self._tuners]

    def changed(self) -> str | None:
        """What changed since, as the start of a sentence ("model.layers.0.mlp.up_proj.weight was written in place"), or
        None."""
        if not self._holds_the_same_objects():
            return self._first_difference()
        for now, before, what in (
            (list(map(_version, self._tensors)), self._versions, "was written in place"),
            (list(map(torch.Tensor.data_ptr, self._tensors)), self._addresses, "was given other memory"),
        ):
            if now != before:
                at = [a == b for a, b in zip(now, before, strict=True)].index(False)
                return f"{self._names[at]} {what}"
        for (name, layer), state in zip(self._tuners, self._tuner_states, strict=True):
            if _state(layer) != state:
                return f"An adapter of {name} was switched, scaled, merged or disabled"
        return None

    def _holds_the_same_objects(self) -> bool:
        """Whether every module, parameter and buffer is the object that it was, and none came or went."""
        if any(self._empty):
            return False
        now = list(chain.from_iterable(self._values))
        try:
            # Objects that are the same one are equal without a look inside. Other tensors are unequal, or have no truth
            # value, unless they are of one element, which is therefore compared by identity.
            return now == self._held and all(now[i] is tensor for i, tensor in self._single)
        except (RuntimeError, TypeError):
            return False

    def _first_difference(self) -> str:
        for name, held, before in self._held_by_name:
            for key, value in before.items():
                if key not in held:
                    return f"{_joined(name, key)} was removed"
                if held[key] is not value:
                    return f"{_joined(name, key)} was replaced"
            if added := held.keys() - before.keys():
                return f"{_joined(name, min(added))} was added"
        return "The order of modules, parameters or buffers was changed"


_version = attrgetter("_version")
_KEPT_BY_TORCH = set(vars(nn.Module()))
_DEPTH = 3
"""How deep quantized layers keep tensors in objects: bitsandbytes, in the state of a state of a weight."""


def _tensors_of(value: object, depth: int = _DEPTH) -> Iterator[torch.Tensor]:
    """The tensor itself, and those that it is made of, or that a quantized layer's object keeps, such as scales."""
    if isinstance(value, torch.Tensor):
        yield value
        if not _is_plain(value):
            for name in value.__tensor_flatten__()[0]:  # type: ignore[attr-defined] # not declared on Tensor
                yield from _tensors_of(getattr(value, name), depth)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors_of(part, depth)
        return
    if depth and hasattr(value, "__dict__") and not isinstance(value, nn.Module | type | PreTrainedConfig):
        for part in vars(value).values():
            yield from _tensors_of(part, depth - 1)


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}".removeprefix(".")


def _tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of peft that compute adapters, by name; none where peft was never imported."""
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer  # an optional dependency: here only if the user's code has it

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def _computed(layer: Any) -> list[str]:
    """The adapters that the layer adds to its base layer's output at the next forward pass."""
    if layer.disable_adapters or layer.merged:
        return []
    held = {key for kind in layer.adapter_layer_names for key in getattr(layer, kind, ())}
    return [adapter for adapter in layer.active_adapters if adapter in held]


def _knobs(layer: Any, adapter: str) -> dict[str, Any]:
    """Numbers and switches of one adapter in one layer that are not tensors: its scale, its variant."""
    knobs: dict[str, Any] = {"kind": type(layer).__name__}
    for name in ("scaling", "use_dora", "use_rslora", "r", "fan_in_fan_out", "is_feedforward"):
        value = getattr(layer, name, None)
        knobs[name] = value.get(adapter) if isinstance(value, Mapping) else value
    return knobs


def _state(layer: Any) -> tuple[Any, ...]:
    scaling = getattr(layer, "scaling", None)
    scales = tuple(scaling.items()) if isinstance(scaling, Mapping) else scaling
    return tuple(layer.active_adapters), layer.disable_adapters, tuple(layer.merged_adapters), scales


def _unused_prefixes(model: nn.Module) -> Iterator[str]:
    """Prefixes of the names of tensors that belong to adapters without an effect."""
    for name, layer in _tuner_layers(model):
        computed = set(_computed(layer))
        for kind in (*layer.adapter_layer_names, *layer.other_param_names):
            container = getattr(layer, kind, None)
            if isinstance(container, nn.ModuleDict | nn.ParameterDict | Mapping):
                yield from (f"{name}.{kind}.{adapter}" for adapter in container if adapter not in computed)


def _used(tensors: Mapping[str, Any], unused: tuple[str, ...]) -> dict[str, Any]:
    return {
        _plain(name): value
        for name, value in tensors.items()
        if not any(name == prefix or name.startswith(prefix + ".") for prefix in unused)
    }


def _plain(name: str) -> str:
    return name.removeprefix(_BASE_PREFIX).replace(".base_layer", "")


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor is its values: not a subclass that holds packed ones."""
    return type(tensor) in (torch.Tensor, nn.Parameter, DTensor) or not hasattr(type(tensor), "__tensor_flatten__")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
