"""hydra-submitit-launcher's Slurm launcher, with each job's resources from its own layout, and patience: a job that is
killed, out of memory or out of time is one failed job, and the others are waited for. A plugin, because Hydra takes
launchers from the package `hydra_plugins` alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
from omegaconf import DictConfig, OmegaConf, open_dict

if TYPE_CHECKING:
    from submitit import SlurmJob

POLL_S = 10
ON_ANY_CLUSTER = {"timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name",
                  "stderr_to_stdout"}  # fmt: skip
"""submitit's parameters without a prefix; the others are Slurm's."""


class LayoutSlurmLauncher(SlurmLauncher):
    """Submits each job by itself, and returns what became of each."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        from experiments import ledger  # Hydra imports every plugin at every start

        outcomes: dict[int, JobReturn] = {}
        jobs: dict[int, SlurmJob[JobReturn]] = {}
        for index, overrides in enumerate(job_overrides, initial_job_idx):
            config = self._config(overrides, index)
            if ledger.is_finished(Path(config.hydra.sweep.dir) / str(config.hydra.sweep.subdir)):
                outcomes[index] = self._here(overrides, index)
                continue
            jobs[index] = self._submit(config, overrides, index)
            print(f"job {jobs[index].job_id}: #{index} {' '.join(filter_overrides(overrides))}", flush=True)
        _wait(list(jobs.values()))
        for index, job in jobs.items():
            outcomes[index] = _outcome(job, job_overrides[index - initial_job_idx])
        return [outcomes[index] for index in sorted(outcomes)]

    def _config(self, overrides: Sequence[str], index: int) -> DictConfig:
        assert self.hydra_context is not None and self.config is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.num = index
        return config

    def _here(self, overrides: Sequence[str], index: int) -> JobReturn:
        """A finished job only reads its rows again: no need to queue for that."""
        from hydra.core.utils import run_job

        assert self.hydra_context is not None and self.task_function is not None
        config = self._config(overrides, index)
        with open_dict(config):
            config.hydra.job.id = index
        return run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def _submit(self, config: DictConfig, overrides: Sequence[str], index: int) -> SlurmJob[JobReturn]:
        import submitit

        params = _params(config)
        executor = submitit.AutoExecutor(
            folder=params.pop("submitit_folder"), cluster="slurm", slurm_max_num_timeout=params.pop("max_num_timeout")
        )
        executor.update_parameters(
            **{name if name in ON_ANY_CLUSTER else f"slurm_{name}": value for name, value in params.items()}
        )
        return executor.submit(  # type: ignore[return-value]
            self, list(overrides), "hydra.sweep.dir", index, f"job_id_for_{index}", Singleton.get_state()
        )


def _params(config: DictConfig) -> dict[str, Any]:
    """The launcher card's knobs; those that it leaves open are the layout's."""
    from hydra.utils import instantiate

    from experiments.resources import resources

    params: dict[str, Any] = OmegaConf.to_container(config.hydra.launcher, resolve=True)  # type: ignore[assignment]
    del params["_target_"], params["array_parallelism"]
    asked = resources(instantiate(config.hardware, _convert_="all"))
    layout = {"mem_gb": asked.memory_gb, "cpus_per_task": asked.cores_per_node}
    if params["gres"] is None:
        layout["gpus_per_node"] = asked.gpus_per_node
    params |= {name: value for name, value in layout.items() if params[name] is None}
    return params | {"nodes": asked.nodes}


def _wait(jobs: list[SlurmJob[JobReturn]]) -> None:
    """Until all have ended, with one question to Slurm's accounting for all of them at a time."""
    while not all([job.done() for job in jobs]):
        time.sleep(POLL_S)
        jobs[0].watcher.update()


def _outcome(job: SlurmJob[JobReturn], overrides: Sequence[str]) -> JobReturn:
    from submitit.core.utils import FailedJobError, UncompletedJobError

    from experiments.run import NOT_ALL_VALID, JobFailed

    try:
        return job.results()[0]
    except (FailedJobError, UncompletedJobError) as error:
        reason = f"job {job.job_id} ended as {job.state}; its output is {job.paths.stdout}"
        print(f"error: {reason}", file=sys.stderr)
        failed = JobFailed(NOT_ALL_VALID, reason)
        failed.__cause__ = error
        return JobReturn(overrides=list(overrides), status=JobStatus.FAILED, _return_value=failed)
