"""A layout that a job can't have is refused before any job is queued; this needs no cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("launcher", ["slurm", "ray"])
def test_a_layout_of_two_nodes_is_refused_before_a_job_is_queued(launcher: str, tmp_path: Path) -> None:
    if launcher == "ray":
        pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="Ray's launcher is not installed")
    command = [
        sys.executable,
        "-m",
        "experiments.run",
        "-m",
        f"launcher={launcher}",
        "model=tiny",
        "model.weights=random",
        "hardware=h100,4090x16",
        "hardware.check=false",
        "sink=none",
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert "hardware=4090x16 has 2 nodes" in line
    assert "job " not in done.stdout
