"""python -m experiments.run: compose -> instantiate -> rows -> sinks."""

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

from experiments.config import compose
from experiments.execution import (
    NOT_ALL_VALID,
    WAYS_OUT_OF_A_FULL_GPU,
    WRONG_COMMAND,
    JobFailed,
    checkpoint,
    log,
    problems,
    ranks,
    run,
    sweep,
)
from experiments.reporting import write_joined
from experiments.results import displayed_path, runs_in
from kvmem.errors import ConfigError, KVMemError


@hydra.main(config_path=str(compose.CONF), config_name="config", version_base=compose.VERSION_BASE)
def job(config: DictConfig) -> None:
    """One job of Hydra's, in the folder that it made."""
    here = HydraConfig.get()
    try:
        chosen = compose.validate(config)
        resolved = OmegaConf.to_container(config, resolve=True)
        assert isinstance(resolved, dict)
        run_dir = displayed_path(Path(here.runtime.output_dir))
        cards = {str(key): value for key, value in resolved.items()}
        if (count := ranks.needed(chosen)) > 1 and not checkpoint.is_finished(run_dir):
            logging_ = OmegaConf.to_container(here.job_logging, resolve=True)
            rows = ranks.run(count, run_dir, cards, here.overrides.task, logging_)  # type: ignore[arg-type]
        else:
            rows = run(chosen, run_dir, cards, here.overrides.task)
    except torch.OutOfMemoryError as error:
        told = f"{str(error).partition(' Including ')[0]} {WAYS_OUT_OF_A_FULL_GPU}"
        log.error("error: %s", told)
        _end(here.mode, JobFailed(NOT_ALL_VALID, told), error)
    except KVMemError as error:
        log.error("error: %s", error)
        status = WRONG_COMMAND if isinstance(error, ConfigError) else NOT_ALL_VALID
        _end(here.mode, JobFailed(status, str(error)), error)
    if found := problems(rows, chosen.merge.exact):
        log.error("error: %d of %d rows can't be trusted:\n  %s", len(found), len(rows), "\n  ".join(found))
        _end(here.mode, JobFailed(NOT_ALL_VALID, "; ".join(found)))


def _end(mode: RunMode | None, failed: JobFailed, cause: Exception | None = None) -> NoReturn:
    """A job of a sweep is handed on. A run by itself just ends, for Hydra prints a line of its own behind what it is
    handed."""
    failed.__cause__ = cause
    if mode is RunMode.RUN:
        raise SystemExit(failed.exit_status) from failed
    raise failed


def main() -> int:
    """Checks every job of the command line before the first one loads a model, then lets Hydra run them."""
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands exceptions on, and does not print and exit itself
    try:
        compose.check(sys.argv[1:])
        arguments, folder = sweep.with_folder(sys.argv[1:])
        sys.argv[1:] = arguments
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
