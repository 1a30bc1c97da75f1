"""A run from Python: `run_experiment`, for notebooks and scripts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, overload

from experiments.config import RunConfig, compose
from experiments.execution import checkpoint, run_folder
from experiments.execution.ranks import run_job
from experiments.results import Row
from kvmem.errors import ArgumentError


@overload
def run_experiment(config: RunConfig, /, *, out: str | Path | None = None) -> list[Row]: ...


@overload
def run_experiment(*overrides: str, out: str | Path | None = None) -> list[Row]: ...


def run_experiment(*what: Any, out: str | Path | None = None) -> list[Row]:
    """Measures every cell of one run and returns its rows.

    `what` is a `RunConfig`, or overrides as on the command line: `run_experiment("model=tiny", "mode=quick")`.

    `out` is the run's folder; None creates outputs/<date>/<time>/ in the working directory. The folder gets the same
    files as a run from the command line. Cells that are finished in it are not measured again.

    A cell that fails gives a row with `status="failed"`. `row.verdict` says whether a figure is valid.

    Raises ConfigError if the configuration is wrong, or if the folder holds rows of another configuration. Raises
    EngineError if the engine can't start.
    """
    overrides: list[str] = []
    if len(what) == 1 and isinstance(what[0], RunConfig):
        config, cards = what[0], cards_of(what[0])
    elif all(isinstance(override, str) for override in what):
        overrides = list(what)
        composed = compose.compose(overrides)
        config, cards = compose.validate(composed), compose.resolved(composed)
    else:
        raise ArgumentError('run_experiment takes one RunConfig, or overrides such as "model=tiny".')
    folder = Path(out) if out is not None else run_folder.new()
    checkpoint.make(folder)
    return run_job(config, folder, cards, overrides)


def cards_of(config: RunConfig) -> dict[str, Any]:
    """A configuration as plain cards, as Hydra would compose them."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {"_target_": _path(type(config))} | {name: _card(value) for name, value in fields.items()}


def _card(value: Any) -> Any:
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    return {"_target_": _path(type(value)), **dataclasses.asdict(value)}


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
