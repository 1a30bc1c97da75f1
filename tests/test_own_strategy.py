"""A merge strategy in another installed package works by its name, through an entry point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvmem.errors import ConfigError
from kvmem.merge import STRATEGIES, strategy
from kvmem.merge.ropeshift import RopeShift

ROOT = Path(__file__).parents[1]

PYPROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "my-merges"
version = "1.0"

[project.entry-points."kvmem.merge"]
KeepFirst = "my_merges:KeepFirst"
"""

MY_MERGES = '''\
"""A merge strategy outside of kvmem."""

from typing import ClassVar

from kvmem.merge import ConcatStrategy


class KeepFirst(ConcatStrategy):
    """Concatenates stored blocks, and recomputes the first token of every block after the first."""

    name: ClassVar[str] = "KeepFirst"
    exact: ClassVar[bool] = False

    def shift_keys(self, layers, offsets_T, model):
        pass

    def positions_to_recompute(self, blocks, model):
        return [start for start, _ in blocks.body_spans]
'''

USE_BY_NAME = """
import json
import torch
from my_merges import KeepFirst
from kvmem import KVCacheMemory, KVCacheMemoryConfig
from kvmem.cache.dynamic_cache import layers_of
from kvmem.merge import merged_tokens

llm = {"backend": "huggingface", "config": {"model_name_or_path": "random:tiny", "device": "cpu"}}
memory = KVCacheMemory(KVCacheMemoryConfig(extractor_llm=llm, merge="keep_first", separator="\\n"))
backend = memory.backend
texts = ["The dial says seven and the lamp is green.", "The door opens at nine, and the cellar stays closed."]
items = memory.extract(texts)
memory.add(items)
view = memory.get_cache([item.kv_cache_id for item in items])
direct = KeepFirst().merge(items, backend.template.separator_ids("\\n"), backend.model)
same_tensors = all(
    torch.equal(ours, theirs)
    for pair, direct_pair in zip(layers_of(view), layers_of(direct), strict=True)
    for ours, theirs in zip(pair, direct_pair, strict=True)
)
by_name = backend.generate("What does the dial say?", view, 8)
called_directly = backend.generate("What does the dial say?", backend.view(items, KeepFirst(), "\\n"), 8)
print(json.dumps({
    "strategy": type(memory.config.merge).__name__,
    "same_tensors": same_tensors,
    "by_name": by_name.token_ids,
    "called_directly": called_directly.token_ids,
    "cached_tokens": by_name.cached_tokens,
    "merged_tokens": len(merged_tokens(items, backend.template.separator_ids("\\n")).token_ids),
}))
"""


def install(project: Path, target: Path) -> None:
    """Installs the project with pip, without a network."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(project)], check=True)


def test_own_strategy_of_an_installed_package_is_used_by_its_name(tmp_path: Path) -> None:
    project, target = tmp_path / "my-merges", tmp_path / "site"
    project.mkdir()
    (project / "pyproject.toml").write_text(PYPROJECT)
    (project / "my_merges.py").write_text(MY_MERGES)
    install(project, target)
    assert (target / "my_merges.py").is_file()
    done = subprocess.run(
        [sys.executable, "-c", USE_BY_NAME],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(target), str(ROOT)])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["strategy"] == "KeepFirst" and result["same_tensors"]
    assert result["by_name"] == result["called_directly"] and len(result["by_name"]) > 0
    assert result["cached_tokens"] >= result["merged_tokens"] - 1 > 0


@pytest.fixture
def declare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a distribution with these modules and entry points, and no more, on the path of this process."""

    def declare(distribution: str, entry_points: dict[str, str], **modules: str) -> None:
        site = tmp_path / distribution
        info = site / f"{distribution}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in entry_points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[kvmem.merge]", *lines, ""]))
        for name, source in modules.items():
            (site / f"{name}.py").write_text(source)
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(site)

    return declare


def test_own_strategy_is_among_the_choices(declare) -> None:
    declare("keeping", {"KeepFirst": "keeping_merges:KeepFirst"}, keeping_merges=MY_MERGES)
    assert [cls.__module__ for cls in STRATEGIES.installed().values()] == ["keeping_merges"]
    assert type(strategy("keep-first")).__name__ == "KeepFirst"
    assert {"keepfirst", "reprefill"} <= set(STRATEGIES.classes())
    with pytest.raises(
        ConfigError, match=r"Unknown merge strategy 'KeepFist'\. Did you mean KeepFirst\? Choices: .*Re"
    ):
        strategy("KeepFist")


def test_own_strategy_that_is_not_a_merge_strategy_is_refused(declare) -> None:
    source = "class Mean:\n    name = 'Mean'\n\ndef function(): ...\n"
    declare("mean", {"Mean": "mean_merges:Mean", "function": "mean_merges:function"}, mean_merges=source)
    for name in ("Mean", "function"):
        expected = (
            rf"{name} = mean_merges:{name} in the group kvmem\.merge is not a MergeStrategy\. .*kvmem\.merge\.Merge"
        )
        with pytest.raises(ConfigError, match=expected):
            strategy(name)
    assert type(strategy("RopeShift")) is RopeShift, "a wrong entry point does not affect other names"


def test_own_strategy_that_lacks_a_method_is_refused(declare) -> None:
    source = "from kvmem.merge import MergeStrategy\nclass Half(MergeStrategy):\n    name, exact = 'Half', False\n"
    declare("half", {"Half": "half_merges:Half"}, half_merges=source)
    with pytest.raises(ConfigError, match=r"Half = half_merges:Half .* implements its abstract methods"):
        strategy("Half")


def test_own_strategy_with_another_name_than_its_entry_point_is_refused(declare) -> None:
    declare("renamed", {"Mean": "renamed_merges:KeepFirst"}, renamed_merges=MY_MERGES)
    with pytest.raises(
        ConfigError, match=r"Mean = renamed_merges:KeepFirst .* without the name 'Mean'\. Set its attribute"
    ):
        strategy("mean")


@pytest.mark.parametrize("value", ["no_such_module:Mean", "lacking_merges:Mean"])
def test_own_strategy_that_can_not_be_imported_is_refused(declare, value: str) -> None:
    declare("lacking", {"Mean": value}, lacking_merges="")
    with pytest.raises(
        ConfigError, match=rf"Mean = {value} .* can't be imported: .* Correct or uninstall the distribution"
    ):
        strategy("Mean")


def test_own_strategy_with_a_name_that_exists_is_refused(declare) -> None:
    declare("first", {"KeepFirst": "first_merges:KeepFirst"}, first_merges=MY_MERGES)
    declare("second", {"keep_first": "second_merges:KeepFirst"}, second_merges=MY_MERGES)
    with pytest.raises(
        ConfigError, match=r"'KeepFirst' exists more than once: .*first_merges.*second_merges.* Rename one"
    ):
        strategy("KeepFirst")
    declare("third", {"rope_shift": "first_merges:KeepFirst"})
    with pytest.raises(
        ConfigError, match=r"'RopeShift' exists more than once: first_merges:KeepFirst .*kvmem\.merge\.rope"
    ):
        strategy("RopeShift")
