"""What a run leaves in its folder, read back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.results.row import Row
from kvmem.errors import ConfigError

SWEEPS = Path("outputs/sweeps")
ROWS_FILE = "rows.jsonl"
"""The file of a run's rows, one in each line: the record that tables, plots and other sinks are made from."""


@dataclass(frozen=True)
class Run:
    """What a run left in its folder. `config` and `environment` are texts, empty where the file is missing."""

    name: str
    rows: tuple[Row, ...]
    unread_lines: int
    config: str
    environment: str


def read_run(run_dir: Path) -> Run:
    """Reads a run's folder; ConfigError where it is none. A line that a kill cut short is left out and counted."""
    path = run_dir / ROWS_FILE
    if not path.is_file():
        raise ConfigError(f"{run_dir} is no run: it has no rows.jsonl. Runs lie in outputs/<date>/<time>/.")
    rows, unread_lines = [], 0
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            rows.append(Row.from_json(line.decode()))
        except ConfigError as error:
            raise ConfigError(f"{path}, line {number}, was written by another version of kvmem: {error}") from error
        except ValueError:  # not JSON, or not UTF-8
            unread_lines += 1
    texts = [run_dir / name for name in ("config.yaml", "environment.json")]
    config, environment = (text.read_text(encoding="utf-8") if text.is_file() else "" for text in texts)
    return Run("/".join(run_dir.resolve().parts[-2:]), tuple(rows), unread_lines, config, environment)


def read_rows(run_dir: Path) -> list[Row]:
    """The whole rows of a run's folder; a last line that a kill cut short is left out."""
    lines = (run_dir / ROWS_FILE).read_text(encoding="utf-8").splitlines(keepends=True)
    return [Row.from_json(line) for line in lines if line.endswith("\n")]


def runs_in(folder: Path) -> list[Path]:
    """The run folders of a sweep, in the order of its jobs; a run's own folder is its one run."""
    if (folder / ROWS_FILE).is_file():
        return [folder]
    runs = [path.parent for path in folder.glob(f"*/{ROWS_FILE}")]
    return sorted(runs, key=in_order)


def in_order(run_dir: Path) -> tuple[int, str]:
    """Sorts the jobs of a sweep: 10 behind 9."""
    return len(run_dir.name), run_dir.name


def displayed_path(path: Path) -> Path:
    """The path as a person would type it here: relative where it lies in the working folder."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
