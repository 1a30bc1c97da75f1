"""Makes strategies of installed packages choices of Hydra's groups, without a YAML card in conf/.

A package declares an entry point (see kvmem/registry.py). The entry point's name becomes a choice, and the fields of
its dataclass become knobs: `merge=mean merge.weight=0.5`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf.errors import OmegaConfBaseException

from experiments.bench import StorageCard
from kvmem.engines import ENGINES
from kvmem.errors import ConfigError
from kvmem.merge import STRATEGIES
from kvmem.storage import FORMATS

Card = dict[str, Any]


@cache
def register(conf: Path) -> None:
    """Adds the strategies of installed packages to the choices of `merge`, `backend` and `storage`.

    Reads the entry points once in a process. Raises ConfigError if an entry point can't be imported, or has the name of
    a card in `conf`.
    """
    store = ConfigStore.instance()
    for group, name, card in _cards():
        if (conf / group / f"{name}.yaml").is_file():
            raise ConfigError(
                f"The choice {group}={name} exists twice: as conf/{group}/{name}.yaml, and as {card['_target_']} in an "
                "installed package. Rename the package's entry point."
            )
        try:
            store.store(name, card, group, provider=card["_target_"].partition(".")[0])
        except OmegaConfBaseException as error:
            raise ConfigError(f"{group}={name}: a knob of {card['_target_']} can't be configured: {error}") from error


def _cards() -> Iterator[tuple[str, str, Card]]:
    """Yields (group, choice, card) for each strategy of an installed package."""
    for name, strategy in STRATEGIES.installed().items():
        yield "merge", name, _card(strategy)
    for name, engine in ENGINES.installed().items():
        yield "backend", name, _card(engine.config_class)
    for name, file_format in FORMATS.installed().items():
        filename = f"activation_memory{file_format.suffixes[0]}"
        yield "storage", name, _card(StorageCard) | {"memory_filename": filename}


def _card(cls: type) -> Card:
    """The card of a class: its import path, and each knob with its default.

    A knob without a default gets "???", which Hydra treats as missing.
    """
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    knobs = {field.name: _default(field) for field in fields if field.init}
    return {"_target_": f"{cls.__module__}.{cls.__qualname__}", **knobs}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return "???" if field.default is dataclasses.MISSING else field.default
