"""A sweep's folder: outputs/sweeps/<name>-<config hash>, found again by the same command; one folder a job in it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf

from experiments.config import compose
from experiments.execution import checkpoint
from experiments.results import SWEEPS, in_order

FOLDER_KNOB = "hydra.sweep.dir"


def with_folder(arguments: list[str]) -> tuple[list[str], Path | None]:
    """The command line with its sweep's folder in it, and that folder; as it was, and None, where it is no sweep."""
    args = get_args_parser().parse_args(arguments)
    asks = args.help or args.hydra_help or args.cfg or args.info or args.shell_completion
    if not args.multirun or asks or args.config_dir or args.config_path or args.config_name:
        return arguments, None
    if any(override.lstrip("+").startswith(f"{FOLDER_KNOB}=") for override in args.overrides):
        return arguments, compose.sweep_dir(args.overrides)
    folder = folder_of(args.overrides)
    # Beside another override: argparse takes them from one place of the line only.
    place = arguments.index(args.overrides[0]) if args.overrides else len(arguments)
    return [*arguments[:place], f"{FOLDER_KNOB}={folder}", *arguments[place:]], folder


def summary(folder: Path) -> list[str]:
    """What a sweep that has ended says: which jobs are not finished, and how offline W&B runs are sent."""
    jobs = [path for path in folder.iterdir() if path.name.isdigit() or (path / checkpoint.DONE).is_file()]
    runs = sorted(jobs, key=in_order)
    missing = [run.name for run in runs if not checkpoint.is_finished(run)]
    lines = [f"{len(runs) - len(missing)} of {len(runs)} jobs finished, in {folder}"]
    if missing:
        lines.append(f"not finished: {', '.join(missing)}. The same command goes on with them.")
    if offline := sorted(folder.glob("*/wandb/offline-run-*")):
        lines.append(f"W&B runs to send: wandb sync {shlex.join(str(run) for run in offline)}")
    return lines


def folder_of(overrides: Sequence[str]) -> Path:
    """Where the sweep of these overrides lives; sinks don't count."""
    jobs = [compose.compose(job) for job in compose.expand(list(overrides))]
    hashes = [checkpoint.config_hash({str(k): v for k, v in _plain(job).items()}) for job in jobs]
    experiment = [override.partition("=")[2] for override in overrides if override.startswith("experiment=")]
    name = experiment[-1] if experiment else compose.validate(jobs[0]).scenario.name
    name = re.sub(r"[^\w.-]+", "-", name)  # of several experiments a list: Hydra would take its comma for a sweep's
    return SWEEPS / f"{name}-{checkpoint.config_hash({'jobs': hashes})}"


def _plain(job: object) -> dict[object, object]:
    plain = OmegaConf.to_container(job, resolve=True)
    assert isinstance(plain, dict)
    return dict(plain)
