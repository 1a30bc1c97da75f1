"""The documentation builds without a warning, and what it names exists: paths, dotted names, choices and snippets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import griffe
import pytest

from experiments.measurement import verdict

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").rglob("*.md"))
# Parts of names that are placeholders for the reader's own.
EXAMPLES = ("my_merge", "my_package", "<")
# Not in a checkout: made by setting up, building or running.
MADE = ("outputs/<", "outputs/A", "outputs/sweeps/")


WHOLE = MappingProxyType({page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES})
# The same without fenced blocks, whose backticks would pair with those of the text.
TEXTS = MappingProxyType({page: re.sub(r"^```.*?^```", "", text, flags=re.S | re.M) for page, text in WHOLE.items()})


@pytest.fixture(scope="module")
def packages() -> dict[str, griffe.Module]:
    """Both packages as their source says; nothing is imported, so vLLM need not be there."""
    loaded = {}
    for name in ("kvmem", "experiments"):
        module = griffe.load(name, search_paths=[str(ROOT)])
        assert isinstance(module, griffe.Module)
        loaded[name] = module
    return loaded


def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "WARNING" not in built.stdout + built.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES) - 2
    for page in pages:  # nothing is fetched from elsewhere by a reader's browser
        assert not re.search(
            r'<(script|img)[^>]+src="https?://|<link[^>]+stylesheet[^>]+href="https?://', page.read_text()
        )


@pytest.mark.parametrize("page", sorted(TEXTS))
def test_every_path_that_a_page_names_is_there(page: str) -> None:
    named = re.findall(
        r"`((?:kvmem|experiments|conf|docs|examples|tests|outputs/reference|\.ci)/[^`\s]*)`", TEXTS[page]
    )
    named += re.findall(r"\b((?:examples|outputs/reference|tests)/[\w./-]*\w)", WHOLE[page])
    paths = {path for path in named if not any(example in path for example in (*EXAMPLES, *MADE))}
    missing = sorted(path for path in paths if not (ROOT / path).exists())
    assert not missing


@pytest.mark.parametrize("page", sorted(WHOLE))
def test_every_dotted_name_that_a_page_gives_exists(page: str, packages: dict[str, griffe.Module]) -> None:
    files = re.compile(r"\.(py|md|yaml|toml|svg|jsonl?)$")
    dotted = {
        name
        for name in re.findall(r"(?<![/\w.])((?:kvmem|experiments)(?:\.\w+)+)", WHOLE[page])
        if not files.search(name) and not any(example in name for example in EXAMPLES)
    }
    if page == "docs/changelog.md" or not dotted:
        return
    unknown = []
    for name in sorted(dotted):
        top, *below = name.split(".")
        try:
            packages[top][".".join(below)]
        except KeyError:
            unknown.append(name)
    assert not unknown


@pytest.mark.parametrize("page", sorted(WHOLE))
def test_every_choice_of_a_command_has_its_card(page: str) -> None:
    groups = [folder.name for folder in (ROOT / "conf").iterdir() if folder.is_dir() and folder.name != "hydra"]
    commands = re.findall(r"(?:experiments\.run|make run|experiments\.wandb_sweep)\b[^`\n]*", WHOLE[page])
    chosen = {
        (group, choice)
        for command in commands
        for group, choice in re.findall(rf"(?<![\w.])({'|'.join(groups)})=(\w+)", command)
        if choice not in EXAMPLES
    }
    missing = sorted(
        f"{group}={choice}" for group, choice in chosen if not (ROOT / f"conf/{group}/{choice}.yaml").exists()
    )
    assert not missing


def test_the_architecture_names_every_package_and_the_changelog_the_version() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    folders = {init.parent for top in ("kvmem", "experiments") for init in (ROOT / top).rglob("__init__.py")}
    folders = {folder.relative_to(ROOT).as_posix() for folder in folders if "hydra_plugins" not in folder.parts}
    missing = sorted(f"{folder}/" for folder in folders - {"kvmem", "experiments"} if f"`{folder}/`" not in page)
    assert not missing
    version = re.search(r'__version__ = "(.+)"', (ROOT / "kvmem/__init__.py").read_text())
    assert version and f"## [{version[1]}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("folder", sorted(path.name for path in (ROOT / "outputs/reference").iterdir()))
def test_every_reference_run_is_documented(folder: str) -> None:
    assert any(f"outputs/reference/{folder}" in text for text in WHOLE.values())


def test_figures_of_older_rules_are_marked_wherever_they_are_quoted() -> None:
    folders = {path.parent: path.read_text() for path in (ROOT / "outputs/reference").glob("*/rows.jsonl")}
    older = {
        folder.name: any(json.loads(row).get("rules") != verdict.RULES_VERSION for row in rows.splitlines())
        for folder, rows in folders.items()
    }
    for page in ("README.md", "docs/results.md", "docs/merging.md", "docs/experiments/predict.md"):
        named = re.findall(r"`outputs/reference/(\w+)`( \(older rules\))?", WHOLE[page])
        assert named
        assert [folder for folder, mark in named if older[folder] != bool(mark)] == [], page
    table = (ROOT / "outputs/reference/README.md").read_text()
    told = dict(re.findall(r"^\| (\w+) \| (older|present) \| .* \| (?:`.+`|none) \|$", table, re.M))
    assert told == {folder: "older" if is_older else "present" for folder, is_older in older.items()}


@pytest.mark.parametrize("page", ["quickstart.md", "merging.md", "scheduler.md"])
def test_the_snippets_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)
    assert snippets
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), names)
    assert names["answer"].text
