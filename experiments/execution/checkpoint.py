"""What a run's folder says is finished, so that a command goes on where a kill, a time-out or a failure left it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.results import ROWS_FILE as ROWS
from experiments.results import Row, read_run
from kvmem.errors import ConfigError

DONE, LOCK = "DONE.json", "LOCK"
NOT_PART_OF_A_FIGURE = ("sink",)


def config_hash(resolved: Mapping[str, Any]) -> str:
    """12 hex digits of a resolved configuration; where the rows are sent does not count.

    >>> config_hash({"seed": 0, "sink": {"mode": "online"}}) == config_hash({"sink": None, "seed": 0})
    True
    """
    counted = {key: card for key, card in resolved.items() if key not in NOT_PART_OF_A_FIGURE}
    return hashlib.sha256(json.dumps(counted, sort_keys=True, default=str).encode()).hexdigest()[:12]


@dataclass
class Ledger:
    """DONE.json of a run's folder. Each row names its cell in `conditions`, and `cells` are those whose rows all lie in
    rows.jsonl; rows of other cells there are of a cell that was cut short or failed, and are measured again."""

    path: Path
    config_hash: str
    cells: list[str] = field(default_factory=list)
    finished: bool = False
    """Every cell of the run is in `cells`."""

    def kept(self) -> list[Row]:
        """The rows of the finished cells, and rows.jsonl cut down to them. A cell of which no row is left is finished
        no more: a machine that goes down may lose what it had not yet put on disk."""
        if not self.cells:
            return []
        there = read_run(self.path.parent).rows if self.path.with_name(ROWS).is_file() else ()
        rows = [row for row in there if row.conditions.get("cell") in self.cells]
        left = {row.conditions["cell"] for row in rows}
        if not left.issuperset(self.cells):
            self.cells, self.finished = [cell for cell in self.cells if cell in left], False
            self.write()
        _replace(self.path.with_name(ROWS), "".join(f"{row.to_json()}\n" for row in rows))
        return rows

    def finish(self, cell: str) -> None:
        """Call it when all rows of `cell` lie in rows.jsonl, and are worth keeping."""
        self.cells.append(cell)
        self.write()

    def write(self) -> None:
        told = {"config_hash": self.config_hash, "cells": self.cells, "finished": self.finished}
        _replace(self.path, json.dumps(told, indent=2) + "\n")


def is_finished(run_dir: Path) -> bool:
    """Whether a run's folder needs no further work."""
    path = run_dir / DONE
    return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8"))["finished"])


@contextmanager
def opened(run_dir: Path, resolved: Mapping[str, Any]) -> Iterator[Ledger]:
    """The folder's ledger, for this process alone; a kill lets go of it.

    Raises ConfigError where the folder holds rows of another configuration, or another process is writing them.
    """
    with (run_dir / LOCK).open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise ConfigError(
                f"{run_dir} is being written by {lock.read().strip()}. Wait for it, or choose another folder."
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield _read(run_dir / DONE, config_hash(resolved))


def _read(path: Path, config_hash: str) -> Ledger:
    if not path.is_file():
        if (rows := path.with_name(ROWS)).is_file() and rows.stat().st_size:
            raise ConfigError(
                f"{path.parent} holds rows, and no {DONE} that says of which configuration. Choose another folder, or "
                f"remove its {ROWS}."
            )
        ledger = Ledger(path, config_hash)
        ledger.write()
        return ledger
    told = json.loads(path.read_text(encoding="utf-8"))
    if told["config_hash"] != config_hash:
        raise ConfigError(
            f"{path.parent} holds rows of another configuration ({told['config_hash']}; this one is {config_hash}). "
            "Choose another folder, or remove that one."
        )
    return Ledger(path, config_hash, told["cells"], told["finished"])


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
