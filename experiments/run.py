"""`python -m experiments.run`: the command line. Validates every job, then Hydra runs them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments.config import command_line, compose
from experiments.execution import (
    NOT_ALL_VALID,
    OUT_OF_MEMORY_ADVICE,
    WRONG_COMMAND,
    JobFailed,
    log,
    problems,
    run_job,
    sweep,
)
from experiments.reporting import write_joined
from experiments.results import displayed_path, runs_in
from kvmem.errors import ConfigError, KVMemError


@hydra.main(config_path=str(compose.CONF), config_name="config", version_base=compose.VERSION_BASE)
def job(config: DictConfig) -> None:
    """Runs one job, in the folder that Hydra created for it."""
    here = HydraConfig.get()
    tracebacks = bool(config.get("tracebacks"))
    try:
        chosen = compose.validate(config)
        run_dir = displayed_path(Path(here.runtime.output_dir))
        logging = OmegaConf.to_container(here.job_logging, resolve=True)
        assert isinstance(logging, dict)
        settings = {str(key): value for key, value in logging.items()}
        rows = run_job(chosen, run_dir, compose.resolved(config), here.overrides.task, settings)
    except torch.OutOfMemoryError as error:
        reason = f"{str(error).partition(' Including ')[0]} {OUT_OF_MEMORY_ADVICE}"
        log.error("error: %s", reason, exc_info=tracebacks)
        _end(here.mode, JobFailed(NOT_ALL_VALID, reason), error)
    except KVMemError as error:
        log.error("error: %s", error, exc_info=tracebacks)
        status = WRONG_COMMAND if isinstance(error, ConfigError) else NOT_ALL_VALID
        _end(here.mode, JobFailed(status, str(error)), error)
    if found := problems(rows, chosen.merge.exact):
        log.error("error: %d of %d rows are not valid:\n  %s", len(found), len(rows), "\n  ".join(found))
        _end(here.mode, JobFailed(NOT_ALL_VALID, "; ".join(found)))


def _end(mode: RunMode | None, failed: JobFailed, cause: Exception | None = None) -> NoReturn:
    """Raises `failed` in a job of a sweep, so that the launcher can report it.

    A single run exits instead, because Hydra prints a line of its own for an exception.
    """
    failed.__cause__ = cause
    if mode is RunMode.RUN:
        raise SystemExit(failed.exit_status) from failed
    raise failed


def main() -> int:
    """Checks every job of the command line before the first one loads a model, then lets Hydra run the jobs."""
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then passes exceptions on, instead of printing them and exiting
    try:
        command = command_line.read(sys.argv[1:])
        compose.check(command)
        is_sweep = command.multirun and command.runs and not command.other_config
        folder = sweep.folder_of(command.overrides) if is_sweep else None
        try:
            job()
        finally:
            if folder is not None and (runs := runs_in(folder)):
                for line in [*sweep.summary(folder), f"joined: {write_joined(runs, folder)}"]:
                    print(line)
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
