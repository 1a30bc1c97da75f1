"""What our launchers share: each job is submitted by itself, and one that dies is one failed job; the others go on."""

from __future__ import annotations

import os
import pickle
import sys
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, filter_overrides, run_job
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from experiments import launchers

launchers.make_known()  # in a job's process too

LOOK_S = 10
"""How often a cluster is asked about all jobs at once."""


class JobDied(Exception):
    """A job that ended without an answer: killed, out of memory, out of time. The text says where to look."""


class PatientLauncher(Launcher):
    """Submits the jobs of a sweep that are not finished yet, waits for all, and returns what became of each.

    Its subclasses say how one job is submitted, and how its end is learned. One that dies is told of when it does.
    """

    config: DictConfig | None
    hydra_context: HydraContext | None
    task_function: TaskFunction | None

    @abstractmethod
    def submit(self, config: DictConfig, overrides: Sequence[str], index: int) -> tuple[str, Any]:
        """Queues one job; returns the cluster's name for it, and what `result` wants to know of it."""

    @abstractmethod
    def result(self, job: Any) -> JobReturn:
        """Waits for a job's end, in a thread of its own, and returns its answer; raises JobDied."""

    def look(self, jobs: Sequence[Any]) -> None:
        """Called every LOOK_S seconds while jobs are left, where asking for all of them at once is better."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        from experiments import ledger  # Hydra imports every plugin at every start

        outcomes: dict[int, JobReturn] = {}
        jobs: dict[int, Any] = {}
        for index, overrides in enumerate(job_overrides, initial_job_idx):
            config = self._config(overrides, index)
            if ledger.is_finished(Path(config.hydra.sweep.dir) / str(config.hydra.sweep.subdir)):
                outcomes[index] = self._here(config)
                continue
            name, jobs[index] = self.submit(config, overrides, index)
            print(f"job {name}: #{index} {' '.join(filter_overrides(overrides))}", flush=True)
        if jobs:
            with ThreadPoolExecutor(len(jobs)) as threads:
                waiting = {
                    index: threads.submit(self._outcome, job, job_overrides[index - initial_job_idx])
                    for index, job in jobs.items()
                }
                while wait(waiting.values(), LOOK_S).not_done:
                    self.look(list(jobs.values()))
            outcomes |= {index: outcome.result() for index, outcome in waiting.items()}
        return [outcomes[index] for index in sorted(outcomes)]

    def _config(self, overrides: Sequence[str], index: int) -> DictConfig:
        assert self.hydra_context is not None and self.config is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.num = index
            config.hydra.job.id = f"job_id_for_{index}"
        return config

    def _here(self, config: DictConfig) -> JobReturn:
        """A finished job only reads its rows again: no need to queue for that."""
        assert self.hydra_context is not None and self.task_function is not None
        return run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def _outcome(self, job: Any, overrides: Sequence[str]) -> JobReturn:
        from experiments.run import NOT_ALL_VALID, JobFailed

        try:
            return self.result(job)
        except JobDied as error:
            print(f"error: {error}", file=sys.stderr)
            failed = JobFailed(NOT_ALL_VALID, str(error))
            failed.__cause__ = error
            return JobReturn(overrides=list(overrides), status=JobStatus.FAILED, _return_value=failed)


def knobs(config: DictConfig) -> dict[str, Any]:
    """The launcher card's, without its class."""
    card = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    assert isinstance(card, dict)
    return {str(name): value for name, value in card.items() if name != "_target_"}


def there(folder: str, pickled: bytes) -> JobReturn:
    """A job in its own process, maybe on another node, which sees the same `folder`. `pickled` is a function with its
    named arguments."""
    os.chdir(folder)
    function, arguments = pickle.loads(pickled)
    returned = function(**arguments)
    assert isinstance(returned, JobReturn)
    return returned
