"""A run that was cut short goes on where it was; another configuration, or another process, is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.config import compose
from experiments.config.compose import CONF
from experiments.execution import checkpoint, sweep
from experiments.results.run_dir import read_rows, runs_in
from kvmem.errors import ConfigError
from tests.helpers.rows import ttft_row

KNOBS = ["model=tiny", "sink=none", "workload.query_tokens=[32]", "scenario.pairs=2", "scenario.answer_tokens=2"]
TWO_CELLS = "workload.context_tokens=[64,96]"


def run(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.run", *overrides]
    env = os.environ | {"PYTHONPATH": str(CONF.parent)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_only_what_is_missing_is_measured_again(tmp_path: Path) -> None:
    here = [*KNOBS, TWO_CELLS, "hydra.run.dir=run"]
    run(tmp_path, *here)
    rows_file, done_file = tmp_path / "run/rows.jsonl", tmp_path / "run/DONE.json"
    whole = rows_file.read_text()
    first, second = whole.splitlines(keepends=True)
    done = json.loads(done_file.read_text())
    assert done["finished"] and len(done["cells"]) == 2

    # as a kill in the middle of the second cell's line leaves it
    rows_file.write_text(first + second[: len(second) // 2])
    done_file.write_text(json.dumps(done | {"cells": done["cells"][:1], "finished": False}))
    again = run(tmp_path, *here)
    assert "1 of 2 cells were finished before" in again.stdout
    assert rows_file.read_text().startswith(first)
    assert [row.context_tokens for row in read_rows(tmp_path / "run")] == [64, 96]
    assert checkpoint.is_finished(tmp_path / "run")

    whole = rows_file.read_text()
    third = run(tmp_path, *here)
    assert "was finished before" in third.stdout and "loading" not in third.stdout
    assert rows_file.read_text() == whole


def test_a_failed_cell_is_tried_again_and_its_row_replaced(tmp_path: Path) -> None:
    here = [*KNOBS, "workload.context_tokens=[9000,64]", "hydra.run.dir=run"]
    for _ in range(2):
        failed = run(tmp_path, *here)
        assert failed.returncode == 1 and "Error executing job" not in failed.stderr  # Hydra's own line
        rows = read_rows(tmp_path / "run")
        assert sorted((row.context_tokens, row.status) for row in rows) == [(64, "done"), (9000, "failed")]
    assert not checkpoint.is_finished(tmp_path / "run")


@pytest.mark.parametrize("left", [0, 1, None], ids=["none", "one", "no file"])
def test_a_finished_cell_whose_row_is_lost_is_finished_no_more(tmp_path: Path, left: int | None) -> None:
    lines = [ttft_row(context, conditions={"cell": f"{context}/32"}).to_json() + "\n" for context in (64, 96)]
    with checkpoint.opened(tmp_path, {"seed": 0}) as done:
        done.finish("64/32")
        done.finish("96/32")
        done.finished = True
        done.write()
    if left is not None:
        (tmp_path / "rows.jsonl").write_text("".join(lines[:left]) + lines[left][:50])
    with checkpoint.opened(tmp_path, {"seed": 0}) as again:
        assert [row.context_tokens for row in again.kept()] == [64][: left or 0]
        assert again.cells == ["64/32"][: left or 0] and not again.finished
    assert not checkpoint.is_finished(tmp_path)


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    with checkpoint.opened(tmp_path, {"seed": 0}):
        pass
    with (
        pytest.raises(ConfigError, match="holds rows of another configuration"),
        checkpoint.opened(tmp_path, {"seed": 1}),
    ):
        pass


def test_rows_without_a_ledger_are_not_written_over(tmp_path: Path) -> None:
    """Such as a run of an older kvmem left, or one whose DONE.json was not copied along with it."""
    rows = ttft_row().to_json() + "\n"
    (tmp_path / "rows.jsonl").write_text(rows)
    with pytest.raises(ConfigError, match=r"holds rows, and no DONE\.json"), checkpoint.opened(tmp_path, {"seed": 0}):
        pass
    assert (tmp_path / "rows.jsonl").read_text() == rows


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    with (
        checkpoint.opened(tmp_path, {"seed": 0}),
        pytest.raises(ConfigError, match=f"is being written by process {os.getpid()} on "),
        checkpoint.opened(tmp_path, {"seed": 0}),
    ):
        pass


def test_the_same_command_finds_its_sweep_and_another_one_does_not() -> None:
    command = ["-m", "model=tiny", "seed=0,1"]
    arguments, folder = sweep.with_folder(command)
    assert folder is not None and folder.parts[:2] == ("outputs", "sweeps")
    assert arguments == ["-m", f"hydra.sweep.dir={folder}", "model=tiny", "seed=0,1"]
    elsewhere = [*command, "launcher=joblib", "sink=none"]
    assert sweep.with_folder(elsewhere)[1] == folder
    assert sweep.with_folder(["-m", "model=tiny", "seed=0,2"])[1] != folder
    assert sweep.with_folder(["model=tiny"]) == (["model=tiny"], None)


@pytest.mark.parametrize("plus", ["", "++"])
def test_a_folder_that_is_chosen_is_the_one_that_hydra_takes(plus: str) -> None:
    command = ["-m", "model=tiny", "seed=0,1", plus + "hydra.sweep.dir='my runs/${hydra.job.name}'"]
    arguments, folder = sweep.with_folder(command)
    assert arguments == command and folder is not None and folder.parent == Path("my runs")
    assert "$" not in folder.name and "'" not in folder.name


def test_an_override_may_name_what_only_its_job_knows() -> None:
    jobs = compose.expand(["seed=3,4", "workload.seed=${seed}", "hydra.sweep.subdir=job_${hydra.job.num}"])
    assert [job[-1] for job in jobs] == ["hydra.sweep.subdir=job_${hydra.job.num}"] * 2
    assert [compose.compose(job).workload.seed for job in jobs] == [3, 4]


def test_the_jobs_of_a_sweep_may_be_called_anything(tmp_path: Path) -> None:
    for name in ("job_0", "job_1"):
        (tmp_path / name).mkdir()
        with checkpoint.opened(tmp_path / name, {"seed": 0}) as done:
            done.finished = name == "job_0"
            done.write()
    (tmp_path / "plots").mkdir()
    assert sweep.summary(tmp_path)[:2] == [
        f"1 of 2 jobs finished, in {tmp_path}",
        "not finished: job_1. The same command goes on with them.",
    ]


def test_a_sweep_is_joined(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", *KNOBS, "workload.context_tokens=[64]", "seed=0,1", "launcher=joblib")
    (folder,) = (tmp_path / "outputs/sweeps").iterdir()
    assert "2 of 2 jobs finished" in done.stdout
    assert [path.name for path in runs_in(folder)] == ["0", "1"]
    assert "2 rows" in (folder / "table.md").read_text()
