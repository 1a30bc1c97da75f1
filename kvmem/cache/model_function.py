"""How a model computes with its weights, at this moment: its code, hooks, plain attributes and configuration.

`FunctionWatch` notices a change of these; `ModelWatch` notices one of the weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter, itemgetter
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

Hook = TypeVar("Hook", bound=Callable[..., Any])

_observing: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()
_LIBRARIES = ("torch", "transformers", "accelerate", "peft")
"""Packages whose hooks and replaced forward methods place a model on its devices, and change nothing it computes."""
_NOT_ATTRIBUTES = set(vars(nn.Module())) - {"training"}
_PLAIN = (bool, int, float, str, type(None), torch.dtype)


def observing(hook: Hook) -> Hook:
    """Declares that a forward hook, a function, changes nothing, such as one that counts calls. Returns it.

    Registering any other hook on the model of an open engine costs a forward pass of a few tokens at the next use,
    which shows whether the hook changes what the model computes.
    """
    _observing.add(hook)
    return hook


def foreign_code(model: nn.Module) -> list[str]:
    """The names of the hooks and replaced forward methods of `model` that no library has made."""
    found = [f"a hook of {name or 'the model'}" for name, module in model.named_modules() if _hooks_of(module)]
    for name, module in model.named_modules():
        forward = module.__dict__.get("forward")
        if forward is not None and not _is_of_a_library(forward) and not hasattr(module, "_hf_hook"):
            found.append(f"a replaced forward of {name or 'the model'}")
    return found


class FunctionWatch:
    """Notices that a model may compute otherwise than when the watch was made, though its weights are the same.

    Watched are the classes of modules and their forward methods, hooks, plain attributes (numbers, switches, strings,
    functions), the configuration, and torch's precision of matrix products. `changed` takes some tens of microseconds.
    It does not see a changed function of a Python module, such as one that computes RoPE.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        named = list(model.named_modules())
        self._modules = [module for _, module in named]
        self._names = [name or "the model" for name, _ in named]
        self._classes = list(map(type, self._modules))
        self._distinct = list(dict.fromkeys(self._classes))
        self._forwards = list(map(_forward, self._distinct))
        self._dicts = list(map(vars, self._modules))
        self._lengths = list(map(len, self._dicts))
        watched = [(i, _watched(module)) for i, module in enumerate(self._modules)]
        self._attributes = [(itemgetter(*keys), self._dicts[i], i, keys) for i, keys in watched if keys]
        self._values = [_kept(get(held)) for get, held, _, _ in self._attributes]
        self._objects = [
            (held, key, held[key], f"{name}.{key}")
            for held, name in zip(self._dicts, self._names, strict=True)
            for key in _own_names(held)
            if not _is_comparable(held[key])
        ]
        configs = [model.config, *(value for held in self._dicts for value in held.values() if _is_config(value))]
        self._configs = list({id(config): config for found in configs for config in _with_parts(found)}.values())
        self._settings = [_copied(config) for config in self._configs]
        self._hooks, self._registered = self._hooks_now(), RemovableHandle.next_id
        self._hooked = [held for module in self._modules for held in _hook_dicts(module) if held]
        self._hooked_lengths = list(map(len, self._hooked))
        self._precision = torch.get_float32_matmul_precision()

    def changed(self) -> str | None:
        """What changed since, as the start of a sentence ("The config's rope_theta was changed"), or None."""
        try:
            values = [get(held) for get, held, _, _ in self._attributes]
        except KeyError as error:
            return f"The attribute {error} of a module was removed"
        if values != self._values:
            at = [now == before for now, before in zip(values, self._values, strict=True)].index(False)
            return self._difference_of_attributes(at)
        for held, key, before, name in self._objects:
            if held.get(key) is not before:
                return f"{name} was replaced"
        if list(map(type, self._modules)) != self._classes:
            return "The class of a module was replaced"
        if list(map(_forward, self._distinct)) != self._forwards:
            return "The forward method of a class was replaced"
        if (lengths := list(map(len, self._dicts))) != self._lengths:
            at = [now == before for now, before in zip(lengths, self._lengths, strict=True)].index(False)
            return f"An attribute of {self._names[at]} was added or removed"
        for config, before in zip(self._configs, self._settings, strict=True):
            if vars(config) != before:
                return f"{type(config).__name__}.{_first_difference(before, vars(config))} was changed"
        if self._hooks_may_have_changed() and self._hooks_now() != self._hooks:
            return "A forward hook was registered or removed"
        if torch.get_float32_matmul_precision() != self._precision:
            return "torch.set_float32_matmul_precision was called"
        return None

    def _difference_of_attributes(self, at: int) -> str:
        get, held, module, keys = self._attributes[at]
        del get
        before = self._values[at] if len(keys) > 1 else (self._values[at],)
        key = next((key for key, old in zip(keys, before, strict=True) if held[key] != old), keys[0])
        return f"{self._names[module]}.{key} was changed"

    def _hooks_may_have_changed(self) -> bool:
        """Torch counts all hooks that are ever registered, on any module."""
        if list(map(len, self._hooked)) != self._hooked_lengths:
            return True
        if (registered := RemovableHandle.next_id) == self._registered:
            return False
        if self._hooks_now() == self._hooks:
            self._hooked = [held for module in self._modules for held in _hook_dicts(module) if held]
            self._hooked_lengths, self._registered = list(map(len, self._hooked)), registered
            return False
        return True

    def _hooks_now(self) -> list[Callable[..., Any]]:
        everywhere = nn.modules.module
        common = (everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks)
        found = [hook for held in common for hook in held.values() if hook not in _observing]
        return found + [hook for module in self._modules for hook in _hooks_of(module)]


_forward = attrgetter("forward")


def _hook_dicts(module: nn.Module) -> tuple[Mapping[int, Callable[..., Any]], ...]:
    return module._forward_hooks, module._forward_pre_hooks


def _hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    return [
        hook
        for held in _hook_dicts(module)
        for hook in tuple(held.values())
        if hook not in _observing and not _is_of_a_library(hook)
    ]


def _is_of_a_library(function: Any) -> bool:
    module = getattr(function, "__module__", None) or type(function).__module__
    return module.partition(".")[0] in _LIBRARIES


def _watched(module: nn.Module) -> tuple[str, ...]:
    """The names of the module's own attributes that may change what it computes and can be compared."""
    if type(module) is nn.Linear:  # computes with its two parameters only
        return ()
    held = vars(module)
    return tuple(name for name in _own_names(held) if _is_comparable(held[name]))


def _own_names(held: Mapping[str, Any]) -> list[str]:
    """The attributes of a module that torch and transformers don't keep their own accounts in."""
    is_whole_model = "_tp_plan" in held
    return [
        name
        for name in held
        if name not in _NOT_ATTRIBUTES and name != "_is_hf_initialized" and not (is_whole_model and name[0] == "_")
    ]


def _is_comparable(value: Any) -> bool:
    if isinstance(value, list | tuple | set):
        return all(map(_is_comparable, value))
    if isinstance(value, dict):
        return all(map(_is_comparable, value.values()))
    return isinstance(value, _PLAIN) or _is_config(value) or (callable(value) and not isinstance(value, nn.Module))


def _is_config(value: Any) -> bool:
    return isinstance(value, PreTrainedConfig)


def _with_parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if _is_config(value):
            yield from _with_parts(value)


def _copied(config: PreTrainedConfig) -> dict[str, Any]:
    """The config's fields; those of the configs within it are watched apart."""
    return {name: _kept(value) for name, value in vars(config).items()}


def _kept(value: Any) -> Any:
    """The value as it is now: containers are copied, so that a change within them is seen."""
    if isinstance(value, list | tuple | set):
        return type(value)(map(_kept, value))
    return {key: _kept(part) for key, part in value.items()} if type(value) is dict else value


def _first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return next((name for name in (*before, *now) if name not in now or before.get(name) != now[name]), "a field")
