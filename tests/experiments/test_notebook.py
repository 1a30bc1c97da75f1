"""The example notebook runs from its first cell to its last, and a run from Python equals one from the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from experiments import RunConfig, run_experiment
from experiments.bench import ModelCard, StorageCard
from experiments.config.compose import CONF
from experiments.hardware import Hardware
from experiments.scenarios.kv_vs_direct import KVvsDirect
from experiments.sinks.none import NoSink
from experiments.workloads.python_docs import PythonDocs
from kvmem.engines.huggingface import HFConfig
from kvmem.errors import ArgumentError, ConfigError
from kvmem.merge import strategy

NOTEBOOK = CONF.parent / "examples/first_experiment.ipynb"
CELL = ("workload.context_tokens=[64]", "workload.query_tokens=[32]", "scenario.pairs=2", "scenario.answer_tokens=2")


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(CONF.parent), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    assert "ms injected" in printed and "'Reprefill'" in printed and "report.html" in printed


def test_overrides_and_a_typed_config_give_the_same_run(tmp_path: Path) -> None:
    (by_name,) = run_experiment("model=tiny", "sink=none", *CELL, out=tmp_path / "overrides")
    config = RunConfig(
        model=ModelCard(label="tiny", shape="tiny", weights="random"),
        backend=HFConfig(),
        hardware=Hardware(),
        merge=strategy("reprefill"),
        storage=StorageCard(),
        workload=PythonDocs(context_tokens=[64], query_tokens=[32]),
        scenario=KVvsDirect(pairs=2, answer_tokens=2),
        sink=NoSink(),
    )
    (typed,) = run_experiment(config, out=tmp_path / "typed")
    assert typed.status == by_name.status == "done"
    assert (typed.model, typed.context_tokens, typed.equality) == (by_name.model, 64, by_name.equality)
    hashes = [json.loads((tmp_path / one / "DONE.json").read_text())["config_hash"] for one in ("overrides", "typed")]
    assert hashes[0] == hashes[1]
    assert run_experiment(config, out=tmp_path / "overrides") == [
        by_name
    ]  # the run is finished, so its rows are only read


def test_an_invalid_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean tiny"):
        run_experiment("model=tinny", out=tmp_path / "no")
    with pytest.raises(ArgumentError, match="one RunConfig, or overrides"):
        run_experiment(3, out=tmp_path / "no")  # type: ignore[call-overload]  # what the test is about
    assert not (tmp_path / "no").exists()
