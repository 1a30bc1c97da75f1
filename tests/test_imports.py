"""Imports between packages run one way and through public faces; each engine is imported in one place only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up: a package may import packages of the floors below it. A new package gets its floor here.
FLOORS = {
    "kvmem": (
        {"errors"},
        {"cache", "registry"},
        {"models"},
        {"compaction", "merge", "prompt", "storage"},
        {"engines"},
        {"config", "tiers"},
        {"memory"},
        {"scheduler"},
    ),
    "experiments": (
        {"cache_sizes", "hardware", "results", "signals", "text_files"},
        {"performance_model", "sinks", "traces", "workloads"},
        {"measurement"},
        {"baselines", "load_arms"},
        {"bench"},
        {"scenarios"},
        {"config", "reporting"},
        {"execution", "report"},
        {"audit"},
        {"conformance", "repeat", "run", "verify"},
        {"wandb_sweep"},
    ),
}
FLOOR_OF = {
    (top, package): height for top, floors in FLOORS.items() for height, floor in enumerate(floors) for package in floor
}

# The places where any error is caught: that of a cell becomes a failed row with its traceback, and the other cells go
# on; that of a sink beside rows.jsonl becomes one line, and the rows are kept; that of a check on an architecture
# becomes a failed cell of the table.
BOUNDARIES = {
    "experiments/conformance/checks.py",
    "experiments/execution/runner.py",
    "experiments/sinks/guarded.py",
}

INSIDE_A_CACHE = {f"kvmem/cache/{name}.py" for name in ("compacted_layers", "dynamic_cache", "layers")}
"""The files that know what a layer of transformers' cache has."""

LIBRARY = sorted((ROOT / "kvmem").rglob("*.py"))
ALL_FILES = LIBRARY + sorted((ROOT / "experiments").rglob("*.py"))
FRONT_DOORS = {ROOT / "kvmem/__init__.py", ROOT / "experiments/__init__.py"}
INSIDE = [path for path in ALL_FILES if path not in FRONT_DOORS]


def imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every import in a file, also in functions; `import a.b` has the name ""."""
    found: list[tuple[str, str]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: a relative import hides its direction"
            found += [(node.module, alias.name) for alias in node.names]
    return found


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def package_of(path: Path) -> str:
    """The package that a file belongs to, dotted: its folder."""
    return ".".join(path.relative_to(ROOT).parent.parts)


def is_package(module: str) -> bool:
    return (ROOT / module.replace(".", "/") / "__init__.py").is_file()


def package_key(module: str) -> tuple[str, str]:
    """The top-level package and the package or module below it: ("kvmem", "cache")."""
    top, _, rest = module.partition(".")
    return top, rest.partition(".")[0]


def ours(path: Path) -> list[tuple[str, str]]:
    """What a file imports from this repository; `from kvmem import x` counts as kvmem.x if that is a module."""
    found = []
    for module, name in imports(path):
        if module.split(".")[0] not in FLOORS:
            continue
        below = f"{module}.{name}"
        is_module = is_package(below) or (ROOT / (below.replace(".", "/") + ".py")).is_file()
        found.append((below, "") if is_module else (module, name))
    return found


@pytest.mark.parametrize("path", INSIDE, ids=name_of)
def test_a_package_imports_only_the_floors_below(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    me = parts[0], parts[1]
    assert me in FLOOR_OF, f"{'.'.join(me)} has no floor yet: give it one in FLOORS"
    for module, name in ours(path):
        other = package_key(module)
        if other[0] == me[0] == "kvmem":
            assert other[1], f"{name_of(path)} imports {name} from the library's front door"
        if other[0] != me[0] or other == me or not other[1]:
            continue
        assert FLOOR_OF[other] < FLOOR_OF[me], f"{name_of(path)} imports {module}"


def test_the_packages_by_floor_without_a_circle(capsys):
    """Prints the floors that follow from the imports; packages in a circle would have none."""
    for top in FLOORS:
        below: dict[str, set[str]] = defaultdict(set)
        for path in [path for path in INSIDE if path.relative_to(ROOT).parts[0] == top]:
            me = path.relative_to(ROOT).with_suffix("").parts[1]
            below[me] |= {
                other for first, other in map(package_key, (module for module, _ in ours(path))) if first == top
            }
        left = {me: others - {me, ""} for me, others in below.items()}
        height = 0
        with capsys.disabled():
            print(f"\n{top}, from the ground up:")
            while left:
                floor = sorted(me for me, others in left.items() if not others & left.keys())
                assert floor, f"a circle among {sorted(left)}"
                print(f"  {height}: {', '.join(floor)}")
                left = {me: others for me, others in left.items() if me not in floor}
                height += 1


@pytest.mark.parametrize("path", INSIDE, ids=name_of)
def test_other_packages_are_imported_by_their_face(path):
    me = package_of(path)
    for module, name in ours(path):
        package = module if is_package(module) else module.rpartition(".")[0]
        within = me == package or me.startswith(package + ".")  # itself, or a package that it lies in
        if within or package in FLOORS or not is_package(package):  # kvmem.errors is a face of its own
            continue
        assert is_package(module) or not name, f"{name_of(path)} imports {module}.{name} past the face of {package}"


@pytest.mark.parametrize("path", ALL_FILES, ids=name_of)
def test_no_private_name_is_used_from_outside(path):
    for module, name in ours(path):
        parts = [*module.split("."), name]
        assert not any(part.startswith("_") for part in parts), f"{name_of(path)} imports {'.'.join(parts)}"


@pytest.mark.parametrize("path", [p for p in ALL_FILES if p.name == "__init__.py"], ids=name_of)
def test_a_package_says_what_it_is_for(path):
    if "hydra_plugins" not in path.parts:
        assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_the_library_knows_nothing_of_the_experiments(path):
    outside = {module.split(".")[0] for module, _ in imports(path)}
    assert not outside & {"experiments", "tests", "hydra", "omegaconf", "wandb", "rich", "matplotlib", "pandas"}


@pytest.mark.parametrize("path", ALL_FILES, ids=name_of)
def test_an_engine_is_imported_only_by_its_own_files(path):
    outside = {module.split(".")[0] for module, _ in imports(path)}
    name = name_of(path)
    assert "vllm" not in outside or name.startswith(
        ("kvmem/engines/vllm/", "experiments/baselines/vllm_", "experiments/measurement/vllm_")
    )
    assert "openai" not in outside or name == "kvmem/engines/vllm/server/client.py"


@pytest.mark.parametrize(
    "path",
    [p for p in LIBRARY if name_of(p) not in INSIDE_A_CACHE],
    ids=name_of,
)
def test_no_other_file_reaches_inside_a_dynamic_cache(path):
    layers = {"keys", "values", "cumulative_length", "is_initialized"}
    tree = ast.parse(path.read_text())
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}  # a dictionary's .keys()
    reached = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and id(n) not in called} & layers
    assert not reached


def test_the_library_is_imported_where_there_is_no_fcntl():
    code = "import sys; sys.modules['fcntl'] = None; import kvmem"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", ALL_FILES, ids=name_of)
def test_no_broad_except(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None
            names = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
            assert not names & {"Exception", "BaseException"} or name_of(path) in BOUNDARIES
