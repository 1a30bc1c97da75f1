"""What our launchers share: each job is submitted by itself, and one that dies is one failed job; the others go on."""

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

plugin_path.make_known()  # in a job's process too

LOOK_S = 10
"""How often a cluster is asked about all jobs at once."""

NOT_TAKEN = (OSError, RuntimeError)  # submitit's FailedSubmissionError is one
NOT_READ = (OSError, RuntimeError, EOFError, pickle.PickleError, ImportError, AttributeError)
"""What clients raise for a job that a cluster refuses, and for an answer that was cut off or of other code."""


class JobDied(Exception):
    """A job that ended without an answer: killed, out of memory, out of time. The text says where to look."""


class PatientLauncher(Launcher):
    """Submits the jobs of a sweep that are not finished yet, waits for all, and returns what became of each.

    Its subclasses say how one job is submitted, and how its end is learned. One that dies is told of when it does.
    """

    config: DictConfig | None
    hydra_context: HydraContext | None
    task_function: TaskFunction | None

    left_behind: ClassVar[str]
    """What becomes of jobs that are waited for no more."""

    @abstractmethod
    def options(self, config: DictConfig) -> dict[str, Any]:
        """What one job asks of the cluster; ConfigError where it can't be had. Asked of all before one is queued."""

    @abstractmethod
    def submit(
        self, config: DictConfig, overrides: Sequence[str], index: int, options: dict[str, Any]
    ) -> tuple[str, Any]:
        """Queues one job; returns the cluster's name for it, and what `result` wants to know of it."""

    @abstractmethod
    def result(self, job: Any) -> JobReturn:
        """Waits for a job's end, in a thread of its own, and returns its answer; raises JobDied."""

    def look(self, jobs: Sequence[Any]) -> None:
        """Called every LOOK_S seconds while jobs are left, where asking for all of them at once is better."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        from experiments.execution import checkpoint  # Hydra imports every plugin at every start

        outcomes: dict[int, JobReturn] = {}
        configs: dict[int, DictConfig] = {}
        for index, overrides in enumerate(job_overrides, initial_job_idx):
            config = self._config(overrides, index)
            if checkpoint.is_finished(Path(config.hydra.sweep.dir) / str(config.hydra.sweep.subdir)):
                outcomes[index] = self._here(config)
            else:
                configs[index] = config
        options = {index: self.options(config) for index, config in configs.items()}
        jobs: dict[int, Any] = {}
        for index, config in configs.items():
            overrides = job_overrides[index - initial_job_idx]
            try:
                name, jobs[index] = self.submit(config, overrides, index, options[index])
            except (KVMemError, *NOT_TAKEN) as error:  # the jobs that are in the queue are still ours
                if not jobs:
                    raise
                outcomes[index] = _failed(f"#{index} was not taken: {type(error).__name__}: {error}", overrides, error)
            else:
                print(f"job {name}: #{index} {' '.join(filter_overrides(overrides))}", flush=True)
        waiting = {
            index: _in_a_thread(self._outcome, job, job_overrides[index - initial_job_idx])
            for index, job in jobs.items()
        }
        try:
            while wait(waiting.values(), LOOK_S).not_done:
                self.look(list(jobs.values()))
        except KeyboardInterrupt:
            print(f"{self.left_behind} The same command goes on with what is missing.", file=sys.stderr)
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
        try:
            return self.result(job)
        except JobDied as error:
            return _failed(str(error), overrides, error)
        except NOT_READ as error:
            return _failed(f"the answer of {job} can't be read: {type(error).__name__}: {error}", overrides, error)


def _failed(reason: str, overrides: Sequence[str], cause: Exception) -> JobReturn:
    from experiments.execution.runner import NOT_ALL_VALID, JobFailed

    print(f"error: {reason}", file=sys.stderr)
    failed = JobFailed(NOT_ALL_VALID, reason)
    failed.__cause__ = cause
    return JobReturn(overrides=list(overrides), status=JobStatus.FAILED, _return_value=failed)


def _in_a_thread(function: Callable[..., JobReturn], *arguments: Any) -> Future[JobReturn]:
    """As an executor's, but that it keeps no process from ending: who waits no more has not to wait for hours."""
    future: Future[JobReturn] = Future()
    Thread(target=lambda: future.set_result(function(*arguments)), daemon=True).start()
    return future


def asked_of_one_node(config: DictConfig) -> Resources:
    """What the job's layout asks of a node. Raises ConfigError for several: a job is one process."""
    from hydra.utils import instantiate

    from experiments.hardware import resources_of

    asked = resources_of(instantiate(config.hardware, _convert_="all"))
    if asked.nodes > 1:
        raise ConfigError(
            f"A job is one process on one node, and hardware={config.hardware.name} has {asked.nodes} nodes. Start "
            "vLLM on them yourself (README, Models on several GPUs), or choose a layout of one node."
        )
    return asked


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
