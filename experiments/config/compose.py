"""From a command line to a validated RunConfig, or one clear error that names the nearest choice and all of them.

Hydra composes; every card is then made into its dataclass, before anything loads. `check` does so for each job of a
command line, so that a sweep fails before its first job.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException
from hydra.types import RunMode
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from experiments.config import plugin_path
from experiments.config.schema import RunConfig
from kvmem.errors import ConfigError, config_error, did_you_mean

CONF = Path(__file__).resolve().parents[2] / "conf"
VERSION_BASE = "1.3"
plugin_path.make_known()  # before Hydra looks for its plugins, which it does once


def compose(overrides: list[str]) -> DictConfig:
    """The configuration of one job; ConfigError for a key, group or choice that does not exist."""
    with _explaining(), initialize_config_dir(str(CONF), version_base=VERSION_BASE):
        return hydra_compose("config", overrides)


def expand(overrides: list[str]) -> list[list[str]]:
    """The overrides of each job of a sweep, as Hydra's own sweeper expands them, its configured params included.

    >>> expand(["seed=1,2", "merge=ropeshift"])
    [['seed=1', 'merge=ropeshift'], ['seed=2', 'merge=ropeshift']]
    """
    with _sweeping(overrides) as (loader, sweep):
        params = [f"{key}={value}" for key, value in (sweep.sweeper.params or {}).items()]
        task, on_hydra = (_as_written(sweep.overrides[kind]) for kind in ("task", "hydra"))
        jobs = BasicSweeper.split_arguments(OverridesParser.create(loader).parse_overrides(params + task), None)[0]
    return [job + on_hydra for job in jobs]


def sweep_dir(overrides: list[str]) -> Path:
    """Where Hydra puts the jobs of a sweep of these overrides."""
    with _sweeping(overrides) as (_, sweep):
        return Path(sweep.sweep.dir)


def validate(config: DictConfig) -> RunConfig:
    """Every card as its dataclass, and all of them as one RunConfig; ConfigError for the first card that is wrong."""
    try:
        cards = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(cards, dict)
    root: dict[str, Any] = {str(key): card for key, card in cards.items() if key != "_target_"}
    known = [field.name for field in dataclasses.fields(RunConfig)]
    for key in root:
        if key not in known:
            raise ConfigError(f"Unknown key {key!r}. {did_you_mean(key, known)}")
    fields = {key: _card(key, card) if isinstance(card, dict) else card for key, card in root.items()}
    try:
        return RunConfig(**fields)
    except ValidationError as error:
        raise config_error("config", error, known) from error


def check(arguments: list[str]) -> None:
    """Validates every job of a command line, and what it only shows; of one that asks for help, what it names."""
    args = get_args_parser().parse_args(arguments)
    if args.hydra_help or args.shell_completion or args.config_dir or args.config_path or args.config_name:
        return  # with other config folders, each job still validates its own
    if args.help or args.info:
        compose(args.overrides)  # which they show as far as it goes
        return
    if args.cfg and args.multirun:
        raise ConfigError("-m runs jobs, and --cfg shows one job's configuration. Use one of them.")
    if args.cfg:
        validate(compose(args.overrides))
        return
    for job in expand(args.overrides) if args.multirun else [args.overrides]:
        try:
            validate(compose(job))
        except ConfigError as error:
            if not args.multirun:
                raise
            raise ConfigError(f"{error} (in the job {' '.join(job)})") from error


def _card(group: str, card: dict[str, Any]) -> Any:
    if "_target_" not in card:
        raise ConfigError(f"{group} has no card. Choose one: {group}=… {_choices(group)}")
    try:
        return instantiate(card, _convert_="all")
    except InstantiationException as error:
        if not isinstance(error.__cause__, ValidationError):
            raise ConfigError(f"{group}: {error}") from error
        known = [field.name for field in dataclasses.fields(get_class(card["_target_"])) if field.init]
        raise config_error(group, error.__cause__, known) from error


@contextmanager
def _sweeping(overrides: list[str]) -> Iterator[tuple[ConfigLoader, DictConfig]]:
    """Hydra's loader, and its own part of a sweep's configuration."""
    with _explaining(), initialize_config_dir(str(CONF), version_base=VERSION_BASE):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        composed = hydra.compose_config("config", overrides, RunMode.MULTIRUN, with_log_configuration=False)
        yield hydra.config_loader, composed.hydra


def _as_written(overrides: ListConfig) -> list[str]:
    """Overrides are texts, though one may name a value of its job's, ${hydra.job.num} say, that is not there yet."""
    texts = OmegaConf.to_container(overrides, resolve=False)
    assert isinstance(texts, list)
    return texts


@contextmanager
def _explaining() -> Iterator[None]:
    try:
        yield
    except HydraException as error:
        raise _explained(error) from error
    except OmegaConfBaseException as error:  # a value that names another, which is not there
        raise ConfigError(str(error).splitlines()[0]) from error
    except ValueError as error:  # Hydra's own: a group that is set to null
        raise ConfigError(f"{error}. Give each group one of its choices, which --help lists.") from error


def _explained(error: HydraException) -> ConfigError:
    """Hydra's exception as one sentence with the nearest choice."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return ConfigError(f"Unknown choice {group}={name}. {did_you_mean(name, error.options)}")
    cause = error.__cause__
    if isinstance(error, ConfigCompositionException) and isinstance(cause, OmegaConfBaseException) and cause.full_key:
        parent = cause.parent_node
        siblings = [str(key) for key in parent] if isinstance(parent, DictConfig) else []
        if cause.full_key == str(cause.key):  # at the root, where groups stand too
            siblings += _groups()
        return ConfigError(f"Unknown key {cause.full_key!r}. {did_you_mean(str(cause.key), _shown(siblings))}")
    return ConfigError(" ".join(line.strip() for line in str(error).splitlines() if "hydra.cc" not in line))


def _shown(keys: Iterable[str]) -> list[str]:
    return [key for key in keys if key not in ("_target_", "hydra")]


def _groups() -> list[str]:
    return [folder.name for folder in CONF.iterdir() if folder.is_dir()]


def _choices(group: str) -> str:
    return did_you_mean("", (path.stem for path in (CONF / group).glob("*.yaml")))
