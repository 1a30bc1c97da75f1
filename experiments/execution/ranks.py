"""Runs whose engine consists of several processes. torchrun starts them, and all of them measure the same cells.

Rank 0 does what a single process does. The other ranks write no files, and no decision depends on their clocks.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments import signals
from experiments.config import RunConfig
from experiments.execution import checkpoint, runner
from experiments.hardware import cores
from experiments.results import Row, read_run
from kvmem.engines.huggingface import HFRanksConfig
from kvmem.errors import ConfigError, EngineError

LOG = "ranks.log"


@dataclass(frozen=True)
class RankTask:
    """The input of each process of a run, as plain JSON. A rank that fails writes why into the folder `errors`."""

    run_dir: str
    resolved: dict[str, Any]
    overrides: list[str]
    logging: dict[str, Any]
    errors: str
    started_by: int
    """The process that started the ranks, with which they end."""


@dataclass(frozen=True)
class RankFailure:
    """Why a rank failed. `is_config` says that the configuration is wrong."""

    is_config: bool
    message: str


def run_job(
    config: RunConfig,
    run_dir: Path,
    resolved: dict[str, Any],
    overrides: Sequence[str] = (),
    logging: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Measures a configuration in as many processes as its engine needs, and returns the rows.

    `resolved` is the configuration as plain cards. `logging` is rank 0's logging configuration
    (`logging.config.dictConfig`); None keeps Python's default. `runner.run` says what a run writes into `run_dir`.
    """
    if (count := process_count(config)) > 1 and not checkpoint.is_settled(run_dir):
        return run(count, run_dir, resolved, overrides, logging or {"version": 1})
    return runner.run(config, run_dir, resolved, overrides)


def process_count(config: RunConfig) -> int:
    """How many processes the run's engine needs.

    Raises ConfigError if the scenario can't be measured by several processes, or if this machine does not match the
    layout.
    """
    if not isinstance(config.backend, HFRanksConfig):
        return 1
    count = config.backend.tensor_parallel_size
    if count == 1:
        raise ConfigError(
            f"backend=hf_ranks divides a model among processes, and hardware={config.hardware.name} has "
            "tensor_parallel=1. Use another layout (hardware=h100x4), set hardware.tensor_parallel, or use "
            "backend=huggingface."
        )
    if not config.scenario.lockstep:
        raise ConfigError(
            f"scenario={config.scenario.name} measures an engine of one process, and backend=hf_ranks has {count} "
            "processes. Use scenario=kv_vs_direct."
        )
    config.hardware.refuse_other_machines()
    return count


def run(
    count: int, run_dir: Path, resolved: dict[str, Any], overrides: Sequence[str], logging: Mapping[str, Any]
) -> list[Row]:
    """Runs `count` processes on this machine, and returns the rows. Raises the error of the first rank that failed."""
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task.json"
        contents = RankTask(str(run_dir), resolved, list(overrides), dict(logging), folder, os.getpid())
        task.write_text(json.dumps(asdict(contents)))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command += ["-m", "experiments.execution.rank_worker", str(task)]
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        env = {"OMP_NUM_THREADS": str(max(1, cores() // count))} | os.environ | paths
        with (run_dir / LOG).open("a+", encoding="utf-8") as log:
            start = log.tell()
            with subprocess.Popen(command, env=env, stderr=log, start_new_session=True) as ranks:
                try:
                    ranks.wait()
                finally:  # also if a signal came: then the ranks still run
                    signals.end_processes(ranks.pid)
                    ranks.terminate()
            log.seek(start)
            output = log.read()
        if ranks.returncode:
            raise _failure(Path(folder), output, run_dir / LOG)
    return list(read_run(run_dir).rows)


def report_failure(folder: str, failure: RankFailure) -> None:
    """Writes why this rank failed into `folder`, where the process that started the ranks reads it."""
    (Path(folder) / f"rank {int(os.environ['RANK']):04}.json").write_text(json.dumps(asdict(failure)))


def _failure(folder: Path, output: str, log: Path) -> ConfigError | EngineError:
    for path in sorted(folder.glob("rank *.json")):
        failure = RankFailure(**json.loads(path.read_text()))
        return ConfigError(failure.message) if failure.is_config else EngineError(failure.message)
    ended = re.findall(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)", output)
    raised = re.findall(r"^(?:\[rank\d+\]: *)?([\w.]+Error: .+)$", output, re.MULTILINE)
    reasons = [f"rank {rank} with status {status}" for status, rank in ended] + raised[:1]
    return EngineError(f"A process of the run ended early: {', '.join(reasons)}. Its output is in {log}.")
