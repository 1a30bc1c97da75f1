"""`backend=hf_ranks`: one command measures on several processes, and can be continued after one of them is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from experiments.config.compose import compose, validate
from experiments.execution import ranks
from experiments.results.run_dir import read_run
from kvmem.errors import ConfigError

ROOT = Path(__file__).parents[3]
TWO = (
    "experiment=hf_ttft_table",
    "backend=hf_ranks",
    "model=tiny",
    "model.shape=tiny_wide",
    "model.weights=random",
    "hardware.tensor_parallel=2",
    "workload=python_docs",
    "workload.context_tokens=[60]",
    "workload.query_tokens=[16,24,40]",
    "sink=none",
)


def started(folder: Path) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "experiments.run", *TWO, "scenario.pairs=12", f"hydra.run.dir={folder}"]
    return subprocess.Popen(
        command, cwd=folder.parent, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def kill_rank(run: subprocess.Popen[str], rank: str) -> None:
    (one,) = [
        child
        for child in psutil.Process(run.pid).children(recursive=True)
        if "experiments.execution.rank_worker" in child.cmdline() and child.environ().get("RANK") == rank
    ]
    one.send_signal(signal.SIGKILL)


def test_a_killed_rank_ends_the_run_and_the_same_command_continues_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = started(folder)
    assert first.stdout is not None
    for line in first.stdout:
        if line.startswith("[2/3]"):
            kill_rank(first, "1")
            break
    output = first.stdout.read()
    assert first.wait() == 1
    assert "rank 1 with status -9" in output and "ranks.log" in output and "Traceback" not in output

    again = started(folder)
    output, _ = again.communicate()
    assert "1 of 3 cells are already finished" in output
    rows = read_run(folder).rows
    assert sorted(row.query_tokens for row in rows) == [16, 24, 40]
    for row in rows:
        assert (row.backend, row.conditions["tensor_parallel"], row.status) == ("hf_ranks", 2, "done")
        assert row.payload is not None and row.payload.figures()["cached_tokens"] == 60
        assert row.equality in ("bitwise", "tokens", "near_tie")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("hardware.tensor_parallel=1",), "hardware=local has tensor_parallel=1"),
        (("scenario=storage",), "scenario=storage measures an engine of one process, and backend=hf_ranks has 2"),
    ],
)
def test_a_run_that_ranks_cannot_measure_is_refused_before_any_rank_starts(
    overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ranks.process_count(validate(compose([*TWO, *overrides])))


def test_an_engine_of_one_device_is_refused_where_the_layout_shares_a_model(tmp_path: Path) -> None:
    config = validate(compose([*TWO, "backend=huggingface"]))
    with pytest.raises(ConfigError, match=r"backend=huggingface uses one\. Use backend=hf_ranks"):
        config.scenario.open(config)
