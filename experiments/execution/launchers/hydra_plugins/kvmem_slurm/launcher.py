"""hydra-submitit-launcher's Slurm launcher, with each job's resources from its own layout, and patience: a job that is
killed, out of memory or out of time is one failed job, and the others are waited for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
from omegaconf import DictConfig

from experiments.execution.launchers.jobs import JobDied, PatientLauncher, asked_of_one_node, knobs

if TYPE_CHECKING:
    from submitit import SlurmJob

ON_ANY_CLUSTER = {
    "timeout_min",
    "cpus_per_task",
    "gpus_per_node",
    "tasks_per_node",
    "mem_gb",
    "nodes",
    "name",
    "stderr_to_stdout",
}
"""submitit's parameters without a prefix; the others are Slurm's."""


class LayoutSlurmLauncher(PatientLauncher, SlurmLauncher):
    """One Slurm job an engine."""

    left_behind: ClassVar[str] = "The jobs go on without this process; scancel ends them."

    def options(self, config: DictConfig) -> dict[str, Any]:
        """submitit's; those that the card leaves open are the layout's."""
        params = knobs(config)
        del params["array_parallelism"]
        asked = asked_of_one_node(config)
        layout = {"mem_gb": asked.memory_gb, "cpus_per_task": asked.cores_per_node}
        if params["gres"] is None:
            layout["gpus_per_node"] = asked.gpus_per_node
        params |= {name: value for name, value in layout.items() if params[name] is None}
        return params | {"nodes": asked.nodes}

    def submit(
        self, config: DictConfig, overrides: Sequence[str], index: int, options: dict[str, Any]
    ) -> tuple[str, Any]:
        import submitit

        params = dict(options)
        executor = submitit.AutoExecutor(
            folder=params.pop("submitit_folder"), cluster="slurm", slurm_max_num_timeout=params.pop("max_num_timeout")
        )
        executor.update_parameters(
            **{name if name in ON_ANY_CLUSTER else f"slurm_{name}": value for name, value in params.items()}
        )
        job = executor.submit(
            self, list(overrides), "hydra.sweep.dir", index, f"job_id_for_{index}", Singleton.get_state()
        )
        return job.job_id, job

    def result(self, job: SlurmJob[JobReturn]) -> JobReturn:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        try:
            return job.results()[0]
        except (FailedJobError, UncompletedJobError) as error:
            raise JobDied(f"job {job.job_id} ended as {job.state}; its output is {job.paths.stdout}") from error

    def look(self, jobs: Sequence[SlurmJob[JobReturn]]) -> None:
        jobs[0].watcher.update()  # one question to accounting for all; submitit itself asks ever more rarely
