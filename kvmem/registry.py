"""Finds the ideas that live one to a file in a package, so that adding one edits no list."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import TypeVar

from kvmem.errors import ConfigError, did_you_mean

T = TypeVar("T")


def classes(package: ModuleType, base: type[T]) -> dict[str, type[T]]:
    """Every concrete subclass of `base` that a module of `package` defines, by its `name` in lower case."""
    found: dict[str, type[T]] = {}
    for module_info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        module = importlib.import_module(module_info.name)
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, base) and cls.__module__ == module.__name__ and not inspect.isabstract(cls):
                found[cls.name.lower()] = cls  # type: ignore[attr-defined]
    return found


def by_name(package: ModuleType, base: type[T], name: str, what: str) -> type[T]:
    """The subclass of `base` called `name` (case does not matter), or a ConfigError with the choices."""
    found = classes(package, base)
    if name.lower() not in found:
        raise ConfigError(f"Unknown {what} {name!r}. {did_you_mean(name.lower(), found)}")
    return found[name.lower()]
