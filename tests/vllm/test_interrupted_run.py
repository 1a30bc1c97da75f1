"""A run under load with more memories than the documentation has topics; SIGTERM ends it and the engine's processes."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from experiments.results import read_rows
from experiments.workloads import QUESTIONS
from tests.faults.commands import alive, descendants, finish, read_to, start
from tests.vllm.conftest import skip_without_vllm

MEMORIES = len(QUESTIONS) + 6
UNDER_LOAD = (
    "model=tiny",
    "model.shape=tiny_wide",
    "sink=none",
    "backend=vllm",
    "hardware.tensor_parallel=2",
    "scenario=under_load",
    f"scenario.memories={MEMORIES}",
    "scenario.memory_tokens=32",
    "scenario.requests=2",
    "scenario.new_tokens=2",
    "scenario.loads=[1.0]",
    "scenario.search=false",
    "scenario.arms=[text,prefix_cache,injected]",
)


@pytest.mark.xdist_group("engine")
@pytest.mark.slow
def test_sigterm_ends_the_engines_processes(tmp_path: Path) -> None:
    skip_without_vllm()
    command = start(tmp_path, *UNDER_LOAD, "hydra.run.dir=run", VLLM_CPU_OMP_THREADS_BIND="nobind")
    read_to(command, "[2/3]")
    workers = descendants(command)
    command.send_signal(signal.SIGTERM)
    status, output = finish(command)
    assert status == 143 and "Traceback" not in output
    assert re.match(r"Interrupted \(SIGTERM\) after \d finished cells?\. To go on: ", output.splitlines()[-1])
    assert len(workers) >= 2 and alive(workers) == []
    row = read_rows(tmp_path / "run")[0]
    assert (row.status, row.arm) == ("done", "direct")
