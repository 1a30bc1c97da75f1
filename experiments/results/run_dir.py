"""What a run leaves in its folder, read back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.row import Row
from kvmem.errors import ConfigError

SWEEPS = Path("outputs/sweeps")


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
    path = run_dir / "rows.jsonl"
    if not path.is_file():
        raise ConfigError(f"{run_dir} is no run: it has no rows.jsonl. Runs lie in outputs/<date>/<time>/.")
    rows, unread_lines = [], 0
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            rows.append(Row.from_json(line.decode()))
        except ValueError:
            unread_lines += 1
        except TypeError as error:  # whole JSON, and other fields than a row's
            raise ConfigError(f"{path}, line {number}, was written by another version of kvmem: {error}") from error
    texts = [run_dir / name for name in ("config.yaml", "environment.json")]
    config, environment = (text.read_text(encoding="utf-8") if text.is_file() else "" for text in texts)
    return Run("/".join(run_dir.resolve().parts[-2:]), tuple(rows), unread_lines, config, environment)


def runs_in(folder: Path) -> list[Path]:
    """The run folders of a sweep, in the order of its jobs; a run's own folder is its one run."""
    if (folder / "rows.jsonl").is_file():
        return [folder]
    runs = [path.parent for path in folder.glob("*/rows.jsonl")]
    return sorted(runs, key=in_order)


def in_order(run_dir: Path) -> tuple[int, str]:
    """Sorts the jobs of a sweep: 10 behind 9."""
    return len(run_dir.name), run_dir.name
