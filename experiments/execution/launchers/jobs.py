"""The base class of the launchers. It submits each job on its own, so that a job that dies does not end the others."""

from __future__ import annotations

import os
import pickle
import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.core.utils import JobReturn, JobStatus, filter_overrides, run_job
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from experiments.config import plugin_path
from kvmem.errors import ConfigError, KVMemError

if TYPE_CHECKING:
    from experiments.hardware import Resources

plugin_path.extend()  # a job's own process needs it too

POLL_S = 10
"""Seconds between two queries of the cluster for the state of all jobs."""

SUBMISSION_ERRORS = (OSError, RuntimeError)
"""The exceptions of clients if a cluster rejects a job. submitit's FailedSubmissionError is a RuntimeError."""
RESULT_ERRORS = (OSError, RuntimeError, EOFError, pickle.PickleError, ImportError, AttributeError)
"""The exceptions of clients if a result is truncated, or was written by other code."""


class JobDied(Exception):
    """A job ended without a result: it was killed, or ran out of memory or time. The message says where its log is."""


class PerJobLauncher(Launcher):
    """Submits each unfinished job of a sweep on its own, waits for all of them, and returns each job's outcome.

    A subclass submits one job and reads its result. A job that dies is reported at once.
    """

    config: DictConfig | None
    hydra_context: HydraContext | None
    task_function: TaskFunction | None

    after_interrupt: ClassVar[str]
    """A sentence for the user: what happens to the jobs after Ctrl-C."""

    @abstractmethod
    def options(self, config: DictConfig) -> dict[str, Any]:
        """What one job requests from the cluster. It is called for all jobs before the first one is queued.

        Raises ConfigError if the cluster can't provide it.
        """

    @abstractmethod
    def submit(
        self, config: DictConfig, overrides: Sequence[str], index: int, options: dict[str, Any]
    ) -> tuple[str, Any]:
        """Queues one job. Returns the cluster's name of the job, and a handle for `result`."""

    @abstractmethod
    def result(self, job: Any) -> JobReturn:
        """Waits until a job ends, and returns its result. Each job has a thread for this call.

        Raises JobDied if the job ended without a result.
        """

    def poll(self, jobs: Sequence[Any]) -> None:
        """Called every POLL_S seconds while jobs are running, for clusters where one request covers all jobs."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        from experiments.execution import checkpoint  # not at the top: Hydra imports every plugin at every start

        outcomes: dict[int, JobReturn] = {}
        configs: dict[int, DictConfig] = {}
        for index, overrides in enumerate(job_overrides, initial_job_idx):
            config = self._config(overrides, index)
            if checkpoint.is_settled(Path(config.hydra.sweep.dir) / str(config.hydra.sweep.subdir)):
                outcomes[index] = self._run_here(config)
            else:
                configs[index] = config
        options = {index: self.options(config) for index, config in configs.items()}
        jobs: dict[int, Any] = {}
        for index, config in configs.items():
            overrides = job_overrides[index - initial_job_idx]
            try:
                name, jobs[index] = self.submit(config, overrides, index, options[index])
            except (KVMemError, *SUBMISSION_ERRORS) as error:
                if not jobs:
                    raise
                # The jobs that are queued already still run, and this process waits for them.
                outcomes[index] = _failed(
                    f"#{index} could not be submitted: {type(error).__name__}: {error}", overrides, error
                )
            else:
                print(f"job {name}: #{index} {' '.join(filter_overrides(overrides))}", flush=True)
        waiting = {
            index: _in_a_thread(self._outcome, job, job_overrides[index - initial_job_idx])
            for index, job in jobs.items()
        }
        try:
            while wait(waiting.values(), POLL_S).not_done:
                self.poll(list(jobs.values()))
        except KeyboardInterrupt:
            print(f"{self.after_interrupt} The same command continues the sweep.", file=sys.stderr)
            raise
        outcomes |= {index: outcome.result() for index, outcome in waiting.items()}
        return [outcomes[index] for index in sorted(outcomes)]

    def _config(self, overrides: Sequence[str], index: int) -> DictConfig:
        assert self.hydra_context is not None and self.config is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.num = index
            config.hydra.job.id = f"job_id_for_{index}"
        return config

    def _run_here(self, config: DictConfig) -> JobReturn:
        """Runs a finished job in this process. The job only reads its rows, so it does not need the cluster."""
        assert self.hydra_context is not None and self.task_function is not None
        return run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def _outcome(self, job: Any, overrides: Sequence[str]) -> JobReturn:
        try:
            return self.result(job)
        except JobDied as error:
            return _failed(str(error), overrides, error)
        except RESULT_ERRORS as error:
            return _failed(f"the result of {job} can't be read: {type(error).__name__}: {error}", overrides, error)


def _failed(reason: str, overrides: Sequence[str], cause: Exception) -> JobReturn:
    from experiments.execution.runner import NOT_ALL_VALID, JobFailed

    print(f"error: {reason}", file=sys.stderr)
    failed = JobFailed(NOT_ALL_VALID, reason)
    failed.__cause__ = cause
    return JobReturn(overrides=list(overrides), status=JobStatus.FAILED, _return_value=failed)


def _in_a_thread(function: Callable[..., JobReturn], *arguments: Any) -> Future[JobReturn]:
    """Runs `function` in a daemon thread, so that Ctrl-C exits at once. Python waits for an executor's threads."""
    future: Future[JobReturn] = Future()
    Thread(target=lambda: future.set_result(function(*arguments)), daemon=True).start()
    return future


def resources_of_one_node(config: DictConfig) -> Resources:
    """The resources of a job's layout. Raises ConfigError if the layout has several nodes: a job is one process."""
    from hydra.utils import instantiate

    from experiments.hardware import resources_of

    resources = resources_of(instantiate(config.hardware, _convert_="all"))
    if resources.nodes > 1:
        raise ConfigError(
            f"A job is one process on one node, and hardware={config.hardware.name} has {resources.nodes} nodes. Start "
            "vLLM on them yourself (README, Models on several GPUs), or choose a layout of one node."
        )
    return resources


def knobs(config: DictConfig) -> dict[str, Any]:
    """The launcher card's knobs, without its class."""
    card = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    assert isinstance(card, dict)
    return {str(name): value for name, value in card.items() if name != "_target_"}


def call_pickled(folder: str, pickled: bytes) -> JobReturn:
    """Runs a job in the current process, in the working directory `folder`. A node of the cluster calls it.

    `pickled` is a pickled pair: a function, and its keyword arguments.
    """
    os.chdir(folder)
    function, arguments = pickle.loads(pickled)
    returned = function(**arguments)
    assert isinstance(returned, JobReturn)
    return returned
