"""hydra-ray-launcher, with two differences.

Each job's resources come from its own layout. If a job is killed or its node is lost, that job fails, and the launcher
waits for the others.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from experiments.execution.launchers.jobs import JobDied, PerJobLauncher, call_pickled, knobs, resources_of_one_node
from kvmem.errors import ConfigError

if TYPE_CHECKING:
    from ray import ObjectRef

INSTALL = "pip install 'kvmem[ray]' && pip install --no-deps hydra-ray-launcher==1.2.2"


class LayoutRayLauncher(PerJobLauncher):
    """Runs each job of the sweep, which is one engine, as one Ray task."""

    after_interrupt: ClassVar[str] = "The jobs end with this process."

    def __init__(self, ray: DictConfig) -> None:
        self.ray_cfg = ray

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context, self.task_function = config, hydra_context, task_function

    def options(self, config: DictConfig) -> dict[str, Any]:
        """The options of ray.remote. Options that the card leaves null come from the layout."""
        resources = resources_of_one_node(config)
        layout = {
            "num_cpus": resources.cores_per_node,
            "num_gpus": resources.gpus_per_node,
            "memory": None if resources.memory_gb is None else int(resources.memory_gb * 1e9),
        }
        chosen = {name: value for name, value in knobs(config)["ray"]["remote"].items() if value is not None}
        return {name: value for name, value in layout.items() if value is not None} | chosen

    def submit(
        self, config: DictConfig, overrides: Sequence[str], index: int, options: dict[str, Any]
    ) -> tuple[str, Any]:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray sends usage statistics by default
        try:
            import ray
            from hydra_plugins.hydra_ray_launcher._launcher_util import _run_job, start_ray
        except ImportError as error:
            raise ConfigError(f"launcher=ray needs Ray and Hydra's launcher for it: {INSTALL}") from error
        start_ray(self.ray_cfg.init)
        call = {
            "hydra_context": self.hydra_context,
            "sweep_config": config,
            "task_function": self.task_function,
            "singleton_state": Singleton.get_state(),
        }
        # The call is pickled here, because a worker finds these plugins only after it has imported `call_pickled`.
        task = ray.remote(**options)(call_pickled).remote(os.getcwd(), ray.cloudpickle.dumps((_run_job, call)))
        return task.task_id().hex(), (index, task)

    def result(self, job: tuple[int, ObjectRef[JobReturn]]) -> JobReturn:
        import ray

        index, task = job
        try:
            returned: JobReturn = ray.get(task)
        except ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())
            raise JobDied(f"job {task.task_id().hex()} (#{index}) ended as {type(error).__name__}: {reason}") from error
        return returned
