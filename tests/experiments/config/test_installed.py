"""A user's own strategy: an installed package provides it through an entry point, and a run chooses it by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.config.compose import CONF
from experiments.results.run_dir import read_rows
from tests.helpers import warm_python

PROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "my-merges"
version = "1"

[project.entry-points."kvmem.merge"]
half_shift = "my_merges:HalfShift"

[tool.setuptools]
py-modules = ["my_merges"]
"""
MODULE = '''\
from dataclasses import dataclass
from typing import ClassVar

from kvmem.merge import strategy, MergeStrategy

@dataclass
class HalfShift(MergeStrategy):
    """A merge with a knob, which does as another one."""

    like: str = "reprefill"
    name: ClassVar[str] = "HalfShift"
    exact: ClassVar[bool] = False

    def merge(self, items, separator_ids, model):
        return strategy(self.like).merge(items, separator_ids, model)
'''
pytestmark = pytest.mark.xdist_group("installed strategy")

RUN = ("model=tiny", "model.weights=random", "mode=quick", "workload.memories=2", "workload.max_cells=1")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the package is installed."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "my_merges.py").write_text(MODULE)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, capture_output=True)
    return target


def run(installed: Path, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return warm_python.run(folder, *overrides, env={"PYTHONPATH": os.pathsep.join([str(CONF.parent), str(installed)])})


def test_own_strategy_appears_in_a_runs_table(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, *RUN, "merge=half_shift", "merge.like=ropeshift", "hydra.run.dir=run")
    (row,) = read_rows(tmp_path / "run")
    assert (row.merge, row.memories, row.status) == ("HalfShift", 2, "done"), done.stdout + done.stderr
    assert "HalfShift" in (tmp_path / "run/table.md").read_text()
    assert "like: ropeshift" in (tmp_path / "run/config.yaml").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("merge=half_shif", "Did you mean half_shift? Choices: cacheblend, half_shift, legolink, "),
        ("+merge.lik=x", "unexpected keyword argument 'lik'"),
    ],
)
def test_own_strategy_that_is_misspelled_is_refused(
    installed: Path, tmp_path: Path, override: str, message: str
) -> None:
    overrides = [override] if override.startswith("merge=") else ["merge=half_shift", override]
    done = run(installed, tmp_path, *RUN, *overrides)
    assert done.returncode == 2 and message in done.stderr and not (tmp_path / "outputs").exists()
