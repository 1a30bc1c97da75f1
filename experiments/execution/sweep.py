"""The folder of a sweep: outputs/sweeps/<name>-<hash of its jobs>. The same command finds it again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from omegaconf import ListConfig, OmegaConf

from experiments.config import compose
from experiments.execution import checkpoint
from experiments.results import SWEEPS, in_order

FOLDER_KNOB = "hydra.sweep.dir"


def folder_of(overrides: Sequence[str]) -> Path:
    """The folder of the sweep over these overrides: `hydra.sweep.dir` if they set it, else one named after its jobs."""
    if any(override.lstrip("+").startswith(f"{FOLDER_KNOB}=") for override in overrides):
        return compose.sweep_dir(overrides)
    return _folder_of_jobs(tuple(overrides))


def summary(folder: Path) -> list[str]:
    """The lines printed at the end of a sweep: which jobs are not finished, and how to upload offline W&B runs."""
    jobs = [path for path in folder.iterdir() if path.name.isdigit() or (path / checkpoint.DONE).is_file()]
    runs = sorted(jobs, key=in_order)
    missing = [run.name for run in runs if not checkpoint.is_finished(run)]
    lines = [f"{len(runs) - len(missing)} of {len(runs)} jobs finished, in {folder}"]
    if missing:
        lines.append(f"not finished: {', '.join(missing)}. The same command continues them.")
    if offline := sorted(folder.glob("*/wandb/offline-run-*")):
        lines.append(f"Upload the W&B runs with: wandb sync {shlex.join(str(run) for run in offline)}")
    return lines


@cache
def _folder_of_jobs(overrides: tuple[str, ...]) -> Path:
    """A folder named after the experiment or the scenario, and a hash of all jobs' configurations.

    A sweep that an older version started under another hash of the same configurations keeps its folder.
    """
    jobs = [compose.resolved(compose.compose(job)) for job in compose.expand(overrides)]
    experiments = [override.partition("=")[2] for override in overrides if override.startswith("experiment=")]
    first = compose.validate(OmegaConf.create(jobs[0]))
    name = experiments[-1] if experiments else first.scenario.name
    name = re.sub(r"[^\w.-]+", "-", name)  # Hydra treats a comma in a folder's name as a sweep
    hashes = [checkpoint.config_hash(job) for job in jobs]
    folder = SWEEPS / f"{name}-{checkpoint.config_hash({'jobs': hashes})}"
    if folder.is_dir():
        return folder
    return next((old for old in sorted(SWEEPS.glob(f"{name}-*")) if _is_sweep_of(old, hashes)), folder)


def _is_sweep_of(folder: Path, hashes: Sequence[str]) -> bool:
    """Whether a folder holds jobs of these configurations only, in this order."""
    started = {path.parent.name: path for path in folder.glob("*/config.yaml") if path.parent.name.isdigit()}
    return bool(started) and all(
        int(number) < len(hashes) and checkpoint.hash_of_run(path.parent) == hashes[int(number)]
        for number, path in started.items()
    )


def _default_folder(task: ListConfig, hydra_overrides: ListConfig) -> str:
    """The value of `${sweep_folder:…}` in conf/config.yaml. Hydra evaluates it once and passes it on to the jobs."""
    lists = [OmegaConf.to_container(overrides, resolve=False) for overrides in (task, hydra_overrides)]
    overrides, others = ([str(override) for override in one or ()] for one in lists)
    return str(_folder_of_jobs((*overrides, *(override for override in others if "hydra.sweeper." in override))))


OmegaConf.register_new_resolver("sweep_folder", _default_folder, use_cache=True, replace=True)
