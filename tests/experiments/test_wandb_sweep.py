"""The sweep file for W&B's agents: its command, as an agent fills it in, runs one job in the sweep's own folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from experiments import wandb_sweep
from experiments.config import compose
from experiments.config.compose import CONF
from experiments.execution import UNDECIDED, checkpoint, sweep
from experiments.sinks.wandb import sweep_arguments
from kvmem.errors import ConfigError

OVERRIDES = (
    "experiment=smoke",
    "workload.context_tokens=[32]",
    "workload.query_tokens=[16]",
    "seed=0,1",
    "sink.mode=offline",
)


def test_an_agents_job_runs_in_the_sweeps_folder(tmp_path: Path) -> None:
    file = yaml.safe_load(wandb_sweep.sweep_file(OVERRIDES))
    ((name, numbers),) = file["parameters"].items()
    assert (file["method"], file["project"], numbers) == ("grid", "kvmem", {"values": [0, 1]})
    filled_in = create_sweep_command_args({"args": {name: {"value": 1}}})["args_no_hyphens"]
    says = {"${env}": [], "python": [sys.executable], "${args_no_hyphens}": filled_in}
    command = [word for part in file["command"] for word in says.get(part, [part])]
    env = os.environ | {"PYTHONPATH": str(CONF.parent), "WANDB_SWEEP_ID": "of no server"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode in (0, UNDECIDED), done.stderr

    folder = sweep.folder_of(OVERRIDES)
    assert folder.name == file["name"]
    assert checkpoint.is_finished(tmp_path / folder / "1") and not (tmp_path / folder / "0").exists()
    assert "seed: 1\n" in (tmp_path / folder / "1" / "config.yaml").read_text()
    assert list((tmp_path / folder / "1" / "wandb").glob("offline-run-*"))


def test_an_agent_chooses_the_id_of_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tmp_path / "outputs/sweeps/x-0123/1"
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    assert sweep_arguments(job, {})["id"] == "x-0123-1"
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    assert sweep_arguments(job, {}) == {"group": "x-0123", "job_type": ""}


def test_the_mode_is_online_unless_one_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert wandb_sweep.main(["experiment=smoke", "seed=0,1"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["command"][-2:] == ["seed=0,1", "sink.mode=online"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["sink=none"], "Use sink=wandb"), (["job=2", "seed=0,1"], "2 jobs, 0 to 1"), (["modle=tiny"], "Did you mean")],
)
def test_a_sweep_that_no_agent_can_run_is_refused(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wandb_sweep.main(arguments) == 2
    assert reason in capsys.readouterr().err


def test_a_wrong_job_is_found_when_the_file_is_written() -> None:
    with pytest.raises(ConfigError, match="Did you mean tiny"):
        wandb_sweep.sweep_file(["model=tiny,tinny"])


def test_the_folder_of_a_sweep_over_experiments_is_a_valid_override() -> None:
    overrides = ["experiment=smoke,vllm_ttft_table", "model=tiny"]
    folder = sweep.folder_of(overrides)
    assert folder.name.startswith("smoke-vllm_ttft_table-")
    assert len(compose.expand([*overrides, f"hydra.sweep.dir={folder}"])) == 2
