"""Turns overrides into a validated RunConfig, or raises one error that names the nearest choice and all choices.

Hydra composes the cards. Each card is then instantiated as its dataclass, before any model loads. `check` does this
for every job of a command line, so a sweep with a wrong job fails before its first job starts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from experiments.config import installed, plugin_path
from experiments.config.command_line import CommandLine
from experiments.config.schema import RunConfig
from kvmem.errors import ConfigError, config_error, did_you_mean

CONF = Path(__file__).resolve().parents[2] / "conf"
VERSION_BASE = "1.3"
JOB_NAME = "run"
"""Hydra's name for the program. It is the same under `python -m experiments.run`."""

plugin_path.extend()  # Hydra looks for its plugins once in a process


def compose(overrides: Sequence[str]) -> DictConfig:
    """Composes the cards of one job. Raises ConfigError for a key, group or choice that does not exist."""
    with _hydra():
        return hydra_compose("config", list(overrides))


def resolved(config: DictConfig) -> dict[str, Any]:
    """The cards as plain data, with interpolations resolved. Raises ConfigError if an interpolation has no value."""
    try:
        cards = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    if not isinstance(cards, dict):
        raise ConfigError("The configuration is not a mapping of cards.")
    return {str(key): card for key, card in cards.items() if key != "hydra"}


def validate(config: DictConfig) -> RunConfig:
    """Instantiates each card, and combines them in one RunConfig. Raises ConfigError for the first wrong card."""
    root = {key: card for key, card in resolved(config).items() if key != "_target_"}
    known = [field.name for field in dataclasses.fields(RunConfig)]
    for key in root:
        if key not in known:
            raise ConfigError(f"Unknown key {key!r}. {did_you_mean(key, known)}")
    plain = "chat_template_kwargs"  # the only mapping that is a value and no card
    fields = {key: _card(key, card) if isinstance(card, dict) and key != plain else card for key, card in root.items()}
    try:
        return RunConfig(**fields)
    except ValidationError as error:
        raise config_error("config", error, known) from error


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each job of a sweep, in the order of Hydra's own sweeper.

    The parameters that `hydra.sweeper.params` configures are part of the sweep.

    >>> expand(["seed=1,2", "merge=ropeshift"])
    [['seed=1', 'merge=ropeshift'], ['seed=2', 'merge=ropeshift']]
    """
    with _hydra():
        given = _parsed(overrides)
        params = _composed_for_sweep(given).hydra.sweeper.params or {}
        choices: dict[str, list[str]] = {}
        for override in _parsed([f"{key}={value}" for key, value in params.items()]) + given:
            if not override.is_hydra_override():
                choices[override.get_key_element()] = _values(override)  # the last override of a key wins
    hydra_overrides = [str(override.input_line) for override in given if override.is_hydra_override()]
    return [[*job, *hydra_overrides] for job in itertools.product(*choices.values())]


def sweep_dir(overrides: Sequence[str]) -> Path:
    """The value of `hydra.sweep.dir` for these overrides."""
    with _hydra():
        return Path(_composed_for_sweep(_parsed(overrides)).hydra.sweep.dir)


def choices(group: str) -> list[str]:
    """The choices of a group: the cards in its folder, and those of installed packages."""
    with _hydra():
        return sorted(GlobalHydra.instance().config_loader().get_group_options(group))


def choices_table() -> str:
    """Each group with its choices, one group a line, for --help.

    A subfolder of a group holds parts of cards, which are not choices.
    """
    return "".join(f"{group}: {', '.join(choices(group))}\n" for group in sorted(_groups()))


OmegaConf.register_new_resolver("choices", choices_table, replace=True)


def check(command: CommandLine) -> None:
    """Validates every job of a command line, also if the command only prints something.

    Raises ConfigError for the first wrong job.
    """
    installed.register(CONF)
    if command.hydra_only or command.other_config:
        return  # each job validates cards of other folders
    if command.help or command.info:
        compose(command.overrides)  # the command prints the composed configuration, valid or not
        return
    if command.cfg and command.multirun:
        raise ConfigError("-m runs jobs, and --cfg shows one job's configuration. Use one of them.")
    if command.cfg:
        validate(compose(command.overrides))
        return
    if not command.multirun:
        _check_job(command.overrides)
        return
    for job in expand(command.overrides):
        try:
            _check_job(job)
        except ConfigError as error:
            raise ConfigError(f"{error} (in the job {' '.join(job)})") from error


def _check_job(overrides: Sequence[str]) -> None:
    config = validate(compose(overrides))
    config.scenario.check(config)


def _card(group: str, card: dict[str, Any]) -> Any:
    if "_target_" not in card:
        raise ConfigError(f"{group} has no card. Choose one: {group}=… {did_you_mean('', choices(group))}")
    try:
        return instantiate(card, _convert_="all")
    except InstantiationException as error:
        if not isinstance(error.__cause__, ValidationError):
            cause = _first_cause(error)
            raise ConfigError(f"{group}: {card['_target_']} can't be made: {type(cause).__name__}: {cause}") from error
        known = [field.name for field in dataclasses.fields(get_class(card["_target_"])) if field.init]
        raise config_error(group, error.__cause__, known) from error


def _first_cause(error: BaseException) -> BaseException:
    """What the code of a user's own strategy raised, below Hydra's own exceptions."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def _hydra() -> Iterator[None]:
    """Initializes Hydra with conf/ and the installed strategies, and turns its errors into ConfigErrors.

    A process has one Hydra at a time. Inside `hydra.main`, its instance is removed and restored afterwards.
    """
    installed.register(CONF)
    current = GlobalHydra.instance()
    outer = current.hydra
    current.clear()
    try:
        with _explaining(), initialize_config_dir(str(CONF), job_name=JOB_NAME, version_base=VERSION_BASE):
            yield
    finally:
        current.clear()
        if outer is not None:
            current.initialize(outer)


def _parsed(overrides: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(overrides))


def _composed_for_sweep(overrides: Sequence[Override]) -> DictConfig:
    """The configuration that all jobs of a sweep share, composed from the overrides that do not vary.

    It includes Hydra's own part.
    """
    shared = [override for override in overrides if override.is_hydra_override() or not override.is_sweep_override()]
    return hydra_compose("config", [str(override.input_line) for override in shared], return_hydra_config=True)


def _values(override: Override) -> list[str]:
    """The overrides that a sweep expands one override into: one for each of its values."""
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    if not override.is_discrete_sweep():
        raise ConfigError(f"{override.input_line}: a sweep needs a list of values: {key}=1,2 or {key}=range(1,3).")
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


@contextmanager
def _explaining() -> Iterator[None]:
    try:
        yield
    except HydraException as error:
        raise _explained(error) from error
    except OmegaConfBaseException as error:  # an interpolation without a value
        raise ConfigError(str(error).splitlines()[0]) from error
    except ConfigError:
        raise
    except ValueError as error:  # Hydra raises it for a group that is set to null
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
        if cause.full_key == str(cause.key):  # at the root, the groups are keys too
            siblings += _groups()
        return ConfigError(f"Unknown key {cause.full_key!r}. {did_you_mean(str(cause.key), _shown(siblings))}")
    return ConfigError(" ".join(line.strip() for line in str(error).splitlines() if "hydra.cc" not in line))


def _shown(keys: Iterable[str]) -> list[str]:
    return [key for key in keys if key not in ("_target_", "hydra")]


def _groups() -> list[str]:
    return [folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name != "hydra"]
