"""hydra-submitit-launcher's Slurm launcher, with two differences.

Each job's resources come from its own layout. If a job is killed, or runs out of memory or time, that job fails, and
the launcher waits for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
from omegaconf import DictConfig

from experiments.execution.launchers.jobs import JobDied, PerJobLauncher, knobs, resources_of_one_node

if TYPE_CHECKING:
    from submitit import SlurmJob

CLUSTER_INDEPENDENT = {
    "timeout_min",
    "cpus_per_task",
    "gpus_per_node",
    "tasks_per_node",
    "mem_gb",
    "nodes",
    "name",
    "stderr_to_stdout",
}
"""submitit's parameters for every kind of cluster. All others are Slurm's and get the prefix slurm_."""


class LayoutSlurmLauncher(PerJobLauncher, SlurmLauncher):
    """Runs each job of the sweep, which is one engine, as one Slurm job."""

    after_interrupt: ClassVar[str] = "The jobs continue without this process; scancel ends them."

    def options(self, config: DictConfig) -> dict[str, Any]:
        """submitit's parameters. Parameters that the card leaves null come from the layout."""
        params = knobs(config)
        del params["array_parallelism"]
        resources = resources_of_one_node(config)
        layout = {"mem_gb": resources.memory_gb, "cpus_per_task": resources.cores_per_node}
        if params["gres"] is None:
            layout["gpus_per_node"] = resources.gpus_per_node
        params |= {name: value for name, value in layout.items() if params[name] is None}
        return params | {"nodes": resources.nodes}

    def submit(
        self, config: DictConfig, overrides: Sequence[str], index: int, options: dict[str, Any]
    ) -> tuple[str, Any]:
        import submitit

        params = dict(options)
        executor = submitit.AutoExecutor(
            folder=params.pop("submitit_folder"), cluster="slurm", slurm_max_num_timeout=params.pop("max_num_timeout")
        )
        executor.update_parameters(
            **{name if name in CLUSTER_INDEPENDENT else f"slurm_{name}": value for name, value in params.items()}
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

    def poll(self, jobs: Sequence[SlurmJob[JobReturn]]) -> None:
        jobs[0].watcher.update()  # one request for all jobs; submitit itself polls less and less often
