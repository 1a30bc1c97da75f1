"""The command line of `python -m experiments.run`. Validates every job, then Hydra runs them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments import signals
from experiments.config import command_line, compose
from experiments.execution import checkpoint, sweep
from experiments.execution.ranks import run_job
from experiments.execution.runner import (
    NOT_ALL_VALID,
    OUT_OF_MEMORY_ADVICE,
    UNDECIDED,
    WRONG_COMMAND,
    JobFailed,
    advice_on_noise,
    doubts,
    log,
    mixtures,
    problems,
)
from experiments.reporting import write_joined
from experiments.results import Row, displayed_path, formatting, read_rows, runs_in
from kvmem.errors import ConfigError, KVMemError

RUN_FOLDER_KNOB = "hydra.run.dir"


@hydra.main(config_path=str(compose.CONF), config_name="config", version_base=compose.VERSION_BASE)
def job(config: DictConfig) -> None:
    """Runs one job, in the folder that Hydra created for it."""
    here = HydraConfig.get()
    tracebacks = bool(config.get("tracebacks"))
    run_dir = displayed_path(Path(here.runtime.output_dir))
    if multiprocessing.parent_process() is not None:  # this is a worker of launcher=joblib
        signals.leave_to(os.getppid())
    try:
        chosen = compose.validate(config)
        log_card = OmegaConf.to_container(here.job_logging, resolve=True)
        assert isinstance(log_card, dict)
        settings = {str(key): value for key, value in log_card.items()}
        rows = run_job(chosen, run_dir, compose.resolved(config), here.overrides.task, settings)
    except torch.OutOfMemoryError as error:
        reason = f"{str(error).partition(' Including ')[0]} {OUT_OF_MEMORY_ADVICE}"
        log.error("error: %s", reason, exc_info=tracebacks)
        _end(here.mode, JobFailed(NOT_ALL_VALID, reason), error)
    except (KVMemError, OSError) as error:
        log.error("error: %s", error, exc_info=tracebacks)
        status = WRONG_COMMAND if isinstance(error, ConfigError) else NOT_ALL_VALID
        _end(here.mode, JobFailed(status, str(error)), error)
    except signals.Stopped as stopped:
        if here.mode is not RunMode.RUN:
            raise
        done = formatting.plural(len(checkpoint.finished_cells(run_dir)), "finished cell")
        log.error("Interrupted (%s) after %s. To go on: %s", stopped.name, done, _command_for(run_dir))
        raise SystemExit(stopped.exit_status) from stopped
    if found := problems(rows, chosen.merge.exact):
        log.error("error: %d of %d rows are not valid:\n  %s", len(found), len(rows), "\n  ".join(found))
        _say_how_to_repeat(rows, run_dir)
        _end(here.mode, JobFailed(NOT_ALL_VALID, "; ".join(found)))
    if found := doubts(rows):
        log.warning("no verdict on %d of %d rows:\n  %s", len(found), len(rows), "\n  ".join(found))
        if advice := advice_on_noise(rows):
            log.info("%s", advice)
        _say_how_to_repeat(rows, run_dir)
    if mixed := mixtures(rows):
        log.warning("not one measurement:\n  %s\nMeasure all cells in a new folder.", "\n  ".join(mixed))
    if (undecided := [*found, *mixed]) and here.mode is RunMode.RUN:  # a sweep has one status for all of its jobs
        _end(here.mode, JobFailed(UNDECIDED, "; ".join(undecided)))


def _end(mode: RunMode | None, failed: JobFailed, cause: Exception | None = None) -> NoReturn:
    """Raises `failed` in a job of a sweep, so that the launcher can report it.

    A single run exits instead, because Hydra prints a line of its own for an exception.
    """
    failed.__cause__ = cause
    if mode is RunMode.RUN:
        raise SystemExit(failed.exit_status) from failed
    raise failed


def _say_how_to_repeat(rows: Sequence[Row], run_dir: Path) -> None:
    if again := checkpoint.unsettled(rows):
        cells = formatting.plural(len(again), "cell")
        how = _command_for(run_dir) if HydraConfig.get().mode is RunMode.RUN else "the same command"
        log.info("To measure %s again: %s", cells, how)


def _command_for(run_dir: Path) -> str:
    """The command that goes on in `run_dir`: this one, with the folder named."""
    given = sys.argv[1:]
    named = any(override.lstrip("+").startswith(f"{RUN_FOLDER_KNOB}=") for override in given)
    folder = [] if named else [f"{RUN_FOLDER_KNOB}={run_dir}"]
    return shlex.join(["python", "-m", "experiments.run", *given, *folder])


def main(arguments: Sequence[str]) -> int:
    """Checks every job of the command line before the first one loads a model, then lets Hydra run the jobs.

    Returns the exit status. Raises `signals.Stopped` if a signal came before a job began.
    """
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    logging.raiseExceptions = wants_traceback  # logging prints a traceback for each line that a full disk refuses
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then passes exceptions on, instead of printing them and exiting
    try:
        command = command_line.read(arguments)
        compose.check(command)
        if command.multirun and command.runs and not command.other_config:
            return _sweep(sweep.folder_of(command.overrides))
        job()
    except (JobFailed, SystemExit) as ended:
        failed = ended if isinstance(ended, JobFailed) else ended.__cause__
        if not isinstance(failed, JobFailed):
            raise
        if wants_traceback:
            raise failed from failed.__cause__
        return failed.exit_status
    except ConfigError as error:
        if wants_traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        return WRONG_COMMAND
    except OSError as error:
        if wants_traceback:
            raise
        knob = sweep.FOLDER_KNOB if command.multirun else RUN_FOLDER_KNOB
        print(f"error: {error}. Another folder for the run is {knob}=…", file=sys.stderr)
        return NOT_ALL_VALID
    return 0


def _sweep(folder: Path) -> int:
    """Runs the jobs of a sweep, and says what has become of them."""
    with ExitStack() as at_the_end:
        at_the_end.callback(_summarize, folder)
        try:
            job()
        except signals.Stopped as stopped:
            at_the_end.pop_all()
            finished = formatting.plural(sum(map(checkpoint.is_finished, runs_in(folder))), "finished job")
            where = f"Interrupted ({stopped.name}) after {finished}, in {folder}."
            print(f"{where} The same command goes on with the others.", file=sys.stderr)
            return stopped.exit_status
        except BrokenExecutor as error:
            codes = re.search(r"exit codes? .*?(\{.*?\}|-?\d+)", str(error))
            how = f" ({codes[1]})" if codes else ""
            print(
                f"error: A process of the sweep was killed{how}, and the others ended. If memory ran out, run fewer "
                "jobs side by side: hydra.launcher.n_jobs=1.",
                file=sys.stderr,
            )
            return NOT_ALL_VALID
    return UNDECIDED if any(doubts(read_rows(run_dir)) for run_dir in runs_in(folder)) else 0


def _summarize(folder: Path) -> None:
    if runs := runs_in(folder):
        for line in [*sweep.summary(folder), f"joined: {write_joined(runs, folder)}"]:
            print(line)
