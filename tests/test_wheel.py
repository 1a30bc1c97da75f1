"""The wheel holds the library alone, and works without the rest of the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from kvmem import __version__

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.xdist_group("wheel")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing left over in the checkout comes in and nothing is left there."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("kvmem", "experiments", "tests", "conf", "examples", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = target.iterdir()
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an empty environment with the wheel in it, and torch and the like from this environment.

    This environment's folder of packages is appended to the path by a .pth file, whose own .pth files Python does not
    follow: the editable installation of this checkout is not among what is found there.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    interpreter = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(interpreter)]
    command += ["install", "--quiet", "--no-index", "--no-deps", str(wheel)]
    # Away from the checkout, whose kvmem.egg-info would count as an installed kvmem.
    subprocess.run(command, check=True, capture_output=True, cwd=folder, env=_outside())
    packages = subprocess.run(
        [str(interpreter), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    (Path(packages) / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return interpreter


def _outside() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def run(python: Path, program: str, folder: Path) -> str:
    """What a program prints in `folder`; -P and no PYTHONPATH keep the checkout off its path."""
    done = subprocess.run(
        [str(python), "-P", "-c", program], cwd=folder, env=_outside(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_library_alone(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"kvmem", f"kvmem-{__version__}.dist-info"}
    in_checkout = [path.relative_to(ROOT).as_posix() for path in (ROOT / "kvmem").rglob("*.py")]
    in_checkout += [path.relative_to(ROOT).as_posix() for path in (ROOT / "kvmem/models/shapes").glob("*.json")]
    assert set(in_checkout) | {"kvmem/py.typed"} == {name for name in names if name.startswith("kvmem/")}


def test_the_readme_snippet_runs_from_the_wheel(python: Path, tmp_path: Path) -> None:
    snippet = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[0]
    found = run(
        python,
        f"{snippet}\nimport kvmem, importlib.metadata\nprint(kvmem.__file__)\n"
        "print(kvmem.__version__, importlib.metadata.version('kvmem'))",
        tmp_path,
    ).splitlines()
    *_, answer, file, versions = found
    assert "prompt tokens from the cache" in answer
    assert Path(file).is_relative_to(python.parents[1])
    assert versions == f"{__version__} {__version__}"
    assert (tmp_path / "tmp/act_mem/activation_memory.safetensors").is_file()


def test_the_wheel_brings_no_experiments(python: Path, tmp_path: Path) -> None:
    program = "import importlib.util; print([importlib.util.find_spec(n) for n in ('experiments', 'tests', 'conf')])"
    assert run(python, program, tmp_path) == "[None, None, None]\n"
