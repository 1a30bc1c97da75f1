"""Finds an implementation by name, in a package of this repository or in any installed package.

A new merge strategy, policy, file format or engine is one new file in its package; no list is edited. Another
distribution declares its class as an entry point, in the group named after that package:

    [project.entry-points."kvmem.merge"]
    mean = "my_package.merges:Mean"
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import ClassVar, Generic, Protocol, TypeVar

from kvmem.errors import ConfigError, did_you_mean


class Named(Protocol):
    """A class with the name that configurations use for it."""

    name: ClassVar[str]


T = TypeVar("T", bound=Named)


class Registry(Generic[T]):
    """The concrete subclasses of `base`, by name. Case, underscores and hyphens in a name do not matter.

    The registry searches the modules of `package`, the `__init__` of its subpackages, and the entry points in the group
    `package`. A lookup first imports the module that has the wanted name, and other modules only if the class is not
    there.
    """

    def __init__(self, base: type[T], package: str, what: str) -> None:
        """`what` names the kind of class in error messages, such as "merge strategy"."""
        self.base, self.package, self.what = base, package, what

    def find(self, name: str) -> type[T]:
        """The class called `name`.

        Raises ConfigError if no class or more than one has the name, or if an entry point is not a class of this kind.
        """
        wanted = _normalized(name)
        here = next((cls for cls in self._of_package(wanted) if _normalized(cls.name) == wanted), None)
        installed = [point for point in self._entry_points() if _normalized(point.name) == wanted]
        if len(installed) + (here is not None) > 1:
            origins = [f"{point.value} (entry point {point.name})" for point in installed]
            origins += [f"{here.__module__}:{here.__qualname__}"] if here is not None else []
            raise ConfigError(f"The {self.what} {name!r} exists more than once: {', '.join(origins)}. Rename one.")
        if installed:
            return self._loaded(installed[0])
        if here is None:
            choices = [cls.name for cls in self._of_package()] + [point.name for point in self._entry_points()]
            raise ConfigError(f"Unknown {self.what} {name!r}. {did_you_mean(name, choices)}")
        return here

    def classes(self) -> dict[str, type[T]]:
        """Every class by its name in lower case. Imports all modules of the package and all entry points."""
        found = {cls.name.lower(): cls for cls in self._of_package()}
        return found | {point.name.lower(): self._loaded(point) for point in self._entry_points()}

    def installed(self) -> dict[str, type[T]]:
        """The classes of other distributions, by the names of their entry points."""
        return {point.name: self._loaded(point) for point in self._entry_points()}

    def _of_package(self, first: str = "") -> Iterator[type[T]]:
        for module in _modules(importlib.import_module(self.package), first):
            for _, cls in inspect.getmembers(module, inspect.isclass):
                defined_there = cls.__module__ == module.__name__ or cls.__module__.startswith(module.__name__ + ".")
                if issubclass(cls, self.base) and defined_there and not inspect.isabstract(cls):
                    yield cls

    def _entry_points(self) -> list[EntryPoint]:
        return sorted(entry_points(group=self.package), key=lambda point: point.name)

    def _loaded(self, point: EntryPoint) -> type[T]:
        where = f"The entry point {point.name} = {point.value} in the group {self.package}"
        try:
            cls = point.load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"{where} can't be imported: {error}. Correct or uninstall the distribution that declares it."
            ) from error
        if not (inspect.isclass(cls) and issubclass(cls, self.base)) or inspect.isabstract(cls):
            raise ConfigError(
                f"{where} is not a {self.base.__name__}. Name a class there that is derived from "
                f"{self.package}.{self.base.__name__} and implements its abstract methods."
            )
        if _normalized(getattr(cls, "name", "")) != _normalized(point.name):
            raise ConfigError(
                f"{where} is a class without the name {point.name!r}. Set its attribute: name = {point.name!r}."
            )
        return cls


def _normalized(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _modules(package: ModuleType, first: str) -> Iterator[ModuleType]:
    """The modules of a package, the one called `first` before the others, then the subpackages at any depth."""
    children = sorted(pkgutil.iter_modules(package.__path__), key=lambda child: _normalized(child.name) != first)
    packages = []
    for child in children:
        module = importlib.import_module(f"{package.__name__}.{child.name}")
        if child.ispkg:
            packages.append(module)
        yield module
    for module in packages:
        yield from _subpackages(module)


def _subpackages(package: ModuleType) -> Iterator[ModuleType]:
    """The subpackages at any depth, without their modules, which may import what is not installed."""
    for child in pkgutil.iter_modules(package.__path__):
        if child.ispkg:
            module = importlib.import_module(f"{package.__name__}.{child.name}")
            yield module
            yield from _subpackages(module)
