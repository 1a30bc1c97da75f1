"""Records which cells of a run are finished, so that the same command continues an interrupted run."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from experiments.measurement import statistics
from experiments.results import ROWS_FILE, Row, read_run
from kvmem.errors import ConfigError, StorageError

DONE, LOCK, WRITER = "DONE.json", "LOCK", "WRITER"
CONFIG = "config.yaml"
NOT_PART_OF_A_FIGURE = ("sink", "tracebacks")
FROM_THE_MODEL_CARD = ("model_name_or_path", "seed")
"""Knobs of a backend that repeat the model card. They count as part of the model card only."""


def config_hash(resolved: Mapping[str, Any]) -> str:
    """A hash of a run's configuration, as 12 hex digits. It covers the classes and knobs of the cards.

    A class counts by its name without its module, so a class that moves keeps its hash. The sink and the logging do not
    count, because they do not change a figure. 12 and 12.0 are one number: a command may have the one, and config.yaml,
    written once the knob has its type, the other.

    >>> config_hash({"merge": {"_target_": "a.Mean"}}) == config_hash({"merge": {"_target_": "b.c.Mean"}, "sink": {}})
    True
    >>> config_hash({"scenario": {"rates": [12, 0.5]}}) == config_hash({"scenario": {"rates": [12.0, 0.5]}})
    True
    """
    return _hash(_whole_numbers(resolved))


def _hash(resolved: Mapping[str, Any]) -> str:
    counted = _without_modules({key: card for key, card in resolved.items() if key not in NOT_PART_OF_A_FIGURE})
    if isinstance(counted.get("backend"), dict):
        counted["backend"] = _without_derived_knobs(counted["backend"], counted.get("hardware"))
    return hashlib.sha256(json.dumps(counted, sort_keys=True, default=str).encode()).hexdigest()[:12]


def hash_of_run(run_dir: Path, numbers_as_written: bool = False) -> str | None:
    """`config_hash` of the config.yaml in a run's folder, which may be from an older version.

    numbers_as_written: the hash of versions to which 12 and 12.0 were two numbers.
    None if there is no such file, or it is damaged.
    """
    try:
        cards = yaml.safe_load((run_dir / CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError, yaml.YAMLError):
        return None
    if not isinstance(cards, dict):
        return None
    return _hash(cards) if numbers_as_written else config_hash(cards)


def recorded_hash(run_dir: Path) -> str | None:
    """The hash of the configuration that a run's rows were measured with, as DONE.json records it; None without it."""
    ledger = _ledger(run_dir / DONE)
    return ledger.config_hash if ledger else None


def _whole_numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _whole_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _without_modules(value: Any) -> Any:
    if isinstance(value, Mapping):
        cards = {key: _without_modules(item) for key, item in value.items()}
        return cards | {"_target_": str(cards["_target_"]).rpartition(".")[2]} if "_target_" in cards else cards
    return [_without_modules(item) for item in value] if isinstance(value, (list, tuple)) else value


def _without_derived_knobs(backend: dict[str, Any], hardware: Any) -> dict[str, Any]:
    """A backend's card without the values that come from the model's card and the layout.

    config.yaml holds these values, a composed card does not. Both have the same hash.
    """
    own = {knob: value for knob, value in backend.items() if knob not in FROM_THE_MODEL_CARD}
    ranks = hardware.get("tensor_parallel") if isinstance(hardware, dict) else None
    if "tensor_parallel_size" in own and own["tensor_parallel_size"] == ranks:
        own["tensor_parallel_size"] = 1
    return own


@dataclass
class Ledger:
    """DONE.json in a run's folder: the cells whose rows are all in rows.jsonl.

    Each row names its cell in `conditions`. Rows of any other cell come from a failed or interrupted measurement. That
    cell is measured again. So is one whose row is invalid or undecided, once every cell has been tried.
    """

    path: Path
    config_hash: str
    cells: list[str] = field(default_factory=list)
    finished: bool = False
    """Whether `cells` holds every cell of the run."""
    earlier: dict[str, list[str]] = field(default_factory=dict)
    """The verdicts of the earlier measurements of a cell that is measured again, in order of time."""
    ended: bool = False
    """Whether the last command tried every cell. An interrupted one is continued first."""

    def finished_rows(self) -> list[Row]:
        """Returns the rows of the finished cells, and removes all other rows from rows.jsonl.

        If the last command ended, a cell with an `unsettled` row no longer counts as finished; its verdict is kept in
        `earlier`.

        A cell without a row no longer counts as finished: its rows were lost if the machine crashed before they were on
        disk.
        """
        if not self.cells:
            return []
        found = read_run(self.path.parent).rows if self.path.with_name(ROWS_FILE).is_file() else ()
        rows = [row for row in found if row.conditions.get("cell") in self.cells]
        open_cells = unsettled(rows) if self.ended else {}
        for cell, verdict in open_cells.items():
            self.earlier.setdefault(cell, []).append(verdict)
        rows = [row for row in rows if row.conditions["cell"] not in open_cells]
        with_rows = {row.conditions["cell"] for row in rows}
        if not with_rows.issuperset(self.cells):
            self.cells, self.finished = [cell for cell in self.cells if cell in with_rows], False
            self.ended = False
            self.write()
        _replace(self.path.with_name(ROWS_FILE), "".join(f"{row.to_json()}\n" for row in rows))
        return rows

    def finish(self, cell: str) -> None:
        """Records a cell as finished. Call it once all its rows are in rows.jsonl and none of them failed."""
        self.cells.append(cell)
        self.write()

    def write(self) -> None:
        content = {"config_hash": self.config_hash, "cells": self.cells, "finished": self.finished, "ended": self.ended}
        if self.earlier:
            content["earlier"] = self.earlier
        _replace(self.path, json.dumps(content, indent=2) + "\n")


def unsettled(rows: Iterable[Row]) -> dict[str, str]:
    """The cells with an invalid or undecided row, each with the worst verdict: the same command measures them again.

    A row of too few pairs stays: another measurement of as few could not decide it. A row without pairs, such as a
    simulated one, is undecided because of a measured one: it is computed again with that one.
    """
    found: dict[str, str] = {}
    computed: dict[str, str] = {}
    for row in rows:
        too_few = 0 < row.pairs < statistics.BATCHES
        if row.verdict == "invalid" or (row.verdict == "undecided" and not too_few):
            of_kind = found if row.pairs or row.verdict == "invalid" else computed
            cell = str(row.conditions.get("cell"))
            of_kind[cell] = "invalid" if of_kind.get(cell) == "invalid" else row.verdict
    return computed | found if found else {}


def is_settled(run_dir: Path) -> bool:
    """Whether the same command would measure nothing: every cell is finished, and none has an `unsettled` row."""
    return is_finished(run_dir) and (run_dir / ROWS_FILE).is_file() and not unsettled(read_run(run_dir).rows)


def is_finished(run_dir: Path) -> bool:
    """Whether every cell of a run is finished."""
    ledger = _ledger(run_dir / DONE)
    return ledger is not None and ledger.finished


def finished_cells(run_dir: Path) -> list[str]:
    """The names of the cells that a run's folder has rows of; none if it is no run's."""
    ledger = _ledger(run_dir / DONE)
    return ledger.cells if ledger else []


def make(run_dir: Path) -> None:
    """Makes a run's folder where there is none. Raises StorageError if it can't be made."""
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)


@contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """For a block that writes into a run's folder: its OSErrors become StorageErrors that name the folder."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"The run's folder {run_dir} can't be written ({error}). Its rows are whole. Choose another folder or make "
            f"room; the same command with hydra.run.dir={run_dir} then goes on with it."
        ) from error


@contextmanager
def opened(run_dir: Path, resolved: Mapping[str, Any]) -> Iterator[Ledger]:
    """The folder's ledger, locked for this process. The lock is released when the process ends.

    Raises ConfigError if the folder holds rows of another configuration, and StorageError if it can't be written, or
    another process is writing to it.
    """
    writer = run_dir / WRITER
    with writing(run_dir):
        try:
            held = FileLock(run_dir / LOCK).acquire(timeout=0)
        except Timeout as error:
            name = writer.read_text(encoding="utf-8").strip() if writer.is_file() else "another process"
            raise StorageError(
                f"{run_dir} is being written by {name}. Wait for it, end it, or choose another folder."
            ) from error
    with held:
        with writing(run_dir):
            writer.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield _read(run_dir / DONE, config_hash(resolved))


def _read(path: Path, config_hash: str) -> Ledger:
    ledger = _ledger(path)
    if ledger is None:
        if (rows := path.with_name(ROWS_FILE)).is_file() and rows.stat().st_size:
            raise ConfigError(
                f"{path.parent} holds rows, but no {DONE} that can be read and says which configuration they belong "
                f"to. Choose another folder, or move its {ROWS_FILE} away."
            )
        ledger = Ledger(path, config_hash)
        ledger.write()
        return ledger
    if ledger.config_hash != config_hash and hash_of_run(path.parent) != config_hash:
        raise ConfigError(
            f"{path.parent} holds rows of another configuration ({ledger.config_hash}; this one is {config_hash}). "
            "Choose another folder, or remove that one."
        )
    ledger.config_hash = config_hash
    return ledger


def _ledger(path: Path) -> Ledger | None:
    """What DONE.json says; None if there is no such file, or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        earlier = {str(cell): list(verdicts) for cell, verdicts in content.get("earlier", {}).items()}
        finished = bool(content["finished"])
        ended = bool(content.get("ended", finished))
        return Ledger(path, str(content["config_hash"]), list(content["cells"]), finished, earlier, ended)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _replace(path: Path, text: str) -> None:
    with writing(path.parent):
        new = path.with_name(f"{path.name}.new")
        new.write_text(text, encoding="utf-8")
        new.replace(path)
