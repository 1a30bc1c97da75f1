"""Weights & Biases: the configuration, each row's metrics as a step, a table of all rows, and the plots.

The default mode is offline.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from experiments.results import SWEEPS, Row, displayed_path, read_rows
from experiments.sinks.base import Sink
from kvmem.errors import ConfigError, did_you_mean

Mode = Literal["offline", "online", "disabled"]
_MODES: dict[str, Mode] = {
    "": "offline",
    "offline": "offline",
    "dryrun": "offline",
    "online": "online",
    "run": "online",
    "disabled": "disabled",
}
INIT_TIMEOUT_S = 30
FINISH_TIMEOUT_S = 60
"""How long W&B may upload at the end of a run. What is not sent by then can be sent later."""

log = logging.getLogger("experiments")


def metrics(row: Row) -> dict[str, int | float]:
    """The numbers of a row and its payload, by field. An interval gives two numbers, its ends."""
    numbers: dict[str, int | float] = {}
    for name, value in columns(row).items():
        if isinstance(value, (int, float)):
            numbers[name] = value
        elif name.endswith("_interval") and value is not None:
            numbers[f"{name}_low"], numbers[f"{name}_high"] = value
    return numbers


def columns(row: Row) -> dict[str, Any]:
    """The fields of a row and of its payload, in one dictionary."""
    fields = dataclasses.asdict(row)
    return fields | (fields.pop("payload") or {})


@dataclass(config=ConfigDict(extra="forbid"))
class WandB(Sink):
    """Sends rows to W&B. It never prompts for a login, and keeps all its files in the run's folder."""

    project: str = "kvmem"
    entity: str | None = None
    name: str | None = None
    """The run's name on W&B; None lets W&B choose one."""
    mode: Literal["auto", "offline", "online", "disabled"] = "auto"
    """auto uses the environment variable WANDB_MODE, or offline if it is not set."""

    def __post_init__(self) -> None:
        self._unreachable: Exception | None = None
        """Why an online run has to be offline."""

    def resolved_mode(self) -> Mode:
        if self.mode != "auto":
            return self.mode
        mode = os.environ.get("WANDB_MODE", "").lower()
        if mode not in _MODES:
            raise ConfigError(f"WANDB_MODE is {mode!r}. {did_you_mean(mode, _MODES.keys() - {''})}")
        return _MODES[mode]

    def check(self) -> None:
        if self.resolved_mode() != "online":
            return
        import wandb  # imported here, because it takes a second

        try:
            with _no_prompt():
                wandb.login()
        except wandb.errors.UsageError as error:
            raise ConfigError(
                "sink.mode=online (or WANDB_MODE) needs a login to W&B, and you are not logged in. Run `wandb login`, "
                "set WANDB_API_KEY, or use sink.mode=offline and `wandb sync` later."
            ) from error
        except wandb.errors.Error as error:
            self._unreachable = error

    def open(self, run_dir: Path, config: dict[str, Any], kept: Sequence[Row] = ()) -> None:
        """Starts a run. If the mode is online and W&B does not answer, or refuses the login, the run is offline."""
        mode = "offline" if self._unreachable else self.resolved_mode()
        import wandb

        try:
            self._start(mode, run_dir, config)
        except (wandb.errors.Error, TimeoutError) as error:
            if mode != "online":
                raise
            self._unreachable = error
            self._start("offline", run_dir, config)
        if self._unreachable:
            reason = (str(self._unreachable).splitlines() or [""])[0].rstrip(".")
            log.warning("W&B failed (%s). This run continues offline. %s", reason, _sync(self._folder))
        self._rows: list[Row] = []
        if self._mode == "online" and not _has_an_agent():  # W&B has these rows already
            self._rows += kept
            return
        for row in kept:
            self.write(row)

    def _start(self, mode: Mode, run_dir: Path, config: dict[str, Any]) -> None:
        _keep_files_in(run_dir, config_too=mode != "online")
        import wandb

        limits: dict[str, Any] = {"finish_timeout": FINISH_TIMEOUT_S, "finish_timeout_raises": True}
        settings = wandb.Settings(
            silent=True,
            console="off",
            x_disable_stats=True,
            disable_git=True,
            init_timeout=INIT_TIMEOUT_S,
            **{name: limit for name, limit in limits.items() if name in wandb.Settings.model_fields},
        )
        with _no_prompt():
            self._run = wandb.init(
                project=self.project,
                entity=self.entity,
                name=self.name,
                mode=mode,
                dir=run_dir,
                config=config,
                **sweep_arguments(run_dir, config),
                settings=settings,
            )
        self._mode = mode

    @property
    def _folder(self) -> Path:
        return displayed_path(Path(self._run.dir).parent)  # …/wandb/offline-run-<time>-<id>/files

    def write(self, row: Row) -> None:
        """Logs the row as one step of W&B's history. The step is called `cell`."""
        self._run.log({"cell": len(self._rows)} | metrics(row))
        self._rows.append(row)

    def close(self, run_dir: Path) -> str | None:
        import wandb

        lines = [columns(row) for row in self._rows]
        names: list[str | int] = list(dict.fromkeys(name for line in lines for name in line))
        data: list[Iterable[Any]] = [[_plain(line.get(str(name))) for name in names] for line in lines]
        make_table: Any = wandb.Table  # it has no annotations
        table = make_table(columns=names, data=data, allow_mixed_types=True)
        self._run.log({"rows": table})
        for plot in sorted((run_dir / "plots").glob("*.png")):
            self._run.log({f"plots/{plot.stem}": wandb.Image(str(plot))})
        folder, url = self._folder, self._run.url if self._mode == "online" else None
        try:
            self._run.finish()
        except TimeoutError:
            return f"W&B did not take all of the run within {FINISH_TIMEOUT_S} s. {_sync(folder)}"
        return {"online": f"W&B run: {url}", "offline": f"W&B run: {folder}. {_sync(folder)}"}.get(self._mode)

    def send_later(self, run_dir: Path) -> str:
        return f"To send them to W&B later: python -m experiments.report --log {shlex.quote(str(run_dir))}"

    def abandon(self) -> None:
        """Ends W&B's service process, so that this process exits quietly, and its next job starts another one."""
        import wandb

        try:
            wandb.teardown()
        except (wandb.errors.Error, OSError, SystemExit):  # it exits where its service process has failed
            return


def _sync(folder: Path) -> str:
    return f"To send it later: wandb sync {shlex.quote(str(folder))}"


def log_run(run_dir: Path) -> str | None:
    """Sends the rows of a finished or killed run to W&B.

    It uses the sink of the run's config.yaml if that is a `WandB`, else the default `WandB()`. Returns a line that says
    where the W&B run is. Raises ConfigError if the mode is online and there is no login.
    """
    path = run_dir / "config.yaml"
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    card = dict(config.get("sink", {}))
    target = card.pop("_target_", "")
    sink = WandB(**card) if target == f"{WandB.__module__}.{WandB.__qualname__}" else WandB()
    sink.check()
    sink.open(run_dir, config)
    for row in read_rows(run_dir):
        sink.write(row)
    return sink.close(run_dir)


def logged_rows(run_dir: Path) -> tuple[Path, list[dict[str, Any]]] | None:
    """The table of rows in the newest offline W&B run of a run's folder: its file, and each row by column.

    None if there is no such table: the run was online, had another sink, or was interrupted.
    """
    tables = sorted((run_dir / "wandb").glob("offline-run-*/files/media/table/rows*.json"))
    if not tables:
        return None
    table = json.loads(tables[-1].read_text(encoding="utf-8"))
    return tables[-1], [dict(zip(table["columns"], line, strict=True)) for line in table["data"]]


def as_logged(row: Row) -> dict[str, Any]:
    """The fields of a row and of its payload, as the cells of W&B's table hold them."""
    return {name: _plain(value) for name, value in columns(row).items()}


def _plain(value: Any) -> str | int | float | bool | None:
    return value if isinstance(value, (str, int, float, bool)) or value is None else json.dumps(value)


def sweep_arguments(run_dir: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `wandb.init` that put a job of a sweep into the sweep's group; none for a single run.

    A job has the same id each time it starts, so W&B continues its run. Under one of W&B's agents, the agent chooses
    the id.
    """
    sweep = run_dir.resolve().parent
    if sweep.parent.name != SWEEPS.name:
        return {}
    scenario = str(config.get("scenario", {}).get("_target_", "")).rpartition(".")[2]
    group = {"group": sweep.name, "job_type": scenario}
    return group if _has_an_agent() else group | {"id": f"{sweep.name}-{run_dir.name}", "resume": "allow"}


def _has_an_agent() -> bool:
    return "WANDB_SWEEP_ID" in os.environ


def _keep_files_in(run_dir: Path, config_too: bool) -> None:
    """Puts W&B's caches into the run's folder and disables its tracing, unless the environment sets these variables.

    `config_too` moves W&B's settings as well. An online run needs the settings in the user's home folder, because they
    name the server that the user is logged in to.
    """
    folder = run_dir.resolve() / "wandb"
    os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")  # where vLLM is installed, W&B recommends it
    for name in ("CACHE", "DATA", "ARTIFACT"):
        os.environ.setdefault(f"WANDB_{name}_DIR", str(folder / name.lower()))
    if config_too:
        os.environ.setdefault("WANDB_CONFIG_DIR", str(folder / "config"))


@contextmanager
def _no_prompt() -> Iterator[None]:
    """Replaces the standard input, because W&B prompts for a login if it is a terminal."""
    stdin = sys.stdin
    with open(os.devnull) as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = stdin
