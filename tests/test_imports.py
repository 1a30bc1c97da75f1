"""Imports point one way, and each outside library is known to its own files alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up: a room may import rooms of the floors below it. A new room gets its floor here.
FLOORS = (
    {"errors"},
    {"discover", "random_weights"},
    {"fingerprint"},
    {"items", "cache_layers"},
    {"dynamic_cache", "rope", "forward", "models"},
    {"recompute"},
    {"prompt", "merge", "storage", "usage", "graph", "arriving"},
    {"unverified", "policies", "journal", "polite", "failures", "loads", "grouping"},
    {"backends"},
    {"config", "costs", "places"},
    {"cold", "compressed"},
    {"memory", "tiers", "planner"},
    {"shelf"},
    {"intake", "lending"},
    {"scheduler"},
)
FLOOR_OF = {room: height for height, floor in enumerate(FLOORS) for room in floor}

# Where what one cell raises becomes a failed row, with its traceback, and the other cells go on.
CELL_BOUNDARY = {"experiments/run.py"}

FILES = sorted((ROOT / "kvmem").rglob("*.py"))
ALL_FILES = FILES + sorted((ROOT / "experiments").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The full names of all modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides its direction"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("path", [p for p in FILES if p != ROOT / "kvmem/__init__.py"], ids=name_of)
def test_a_room_imports_only_the_floors_below(path):
    room = path.relative_to(ROOT / "kvmem").parts[0].removesuffix(".py")
    assert room in FLOOR_OF, f"{room} has no floor yet: give it one in FLOORS"
    for module in imported(path):
        if not module.startswith("kvmem."):
            continue
        other = room_of(module)
        assert other in FLOOR_OF, f"{name_of(path)} imports {module} from the package's front door"
        assert other == room or FLOOR_OF[other] < FLOOR_OF[room], f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_library_knows_nothing_of_the_experiments(path):
    outside = {module.split(".")[0] for module in imported(path)}
    assert not outside & {"experiments", "tests", "hydra", "omegaconf", "wandb", "rich", "matplotlib", "pandas"}


@pytest.mark.parametrize("path", ALL_FILES, ids=name_of)
def test_an_engine_is_known_to_its_own_files_alone(path):
    outside = {module.split(".")[0] for module in imported(path)}
    assert "vllm" not in outside or "vllm" in path.parent.name + path.stem
    assert "openai" not in outside or path.stem == "vllm_server_client"


@pytest.mark.parametrize("path", [p for p in FILES if p.stem not in {"dynamic_cache", "cache_layers"}], ids=name_of)
def test_no_other_file_reaches_inside_a_dynamic_cache(path):
    layers = {"keys", "values", "cumulative_length", "is_initialized"}
    tree = ast.parse(path.read_text())
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}  # a dictionary's .keys()
    reached = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and id(n) not in called} & layers
    assert not reached


@pytest.mark.parametrize("path", ALL_FILES, ids=name_of)
def test_no_broad_except(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None
            names = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
            assert not names & {"Exception", "BaseException"} or name_of(path) in CELL_BOUNDARY
