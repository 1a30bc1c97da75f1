"""A sink that may fail: its first failure is one line, and costs no rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from experiments.results import Row
from experiments.sinks.base import Sink
from kvmem.errors import ConfigError

log = logging.getLogger("experiments")

T = TypeVar("T")


class Guarded(Sink):
    """Passes everything on to `sink` until it fails. Then it logs one line, and the sink is not used again.

    Only the ConfigError of `check` is raised: it comes before a model loads, and is the user's to correct.
    """

    def __init__(self, sink: Sink, run_dir: Path) -> None:
        self.sink, self.run_dir = sink, run_dir
        self.failed = False

    def check(self) -> None:
        try:
            self.sink.check()
        except ConfigError:
            raise
        except Exception as error:
            self._give_up("at the start", error)

    def open(self, run_dir: Path, config: dict[str, Any], kept: Sequence[Row] = ()) -> None:
        self._try("at the start", lambda: self.sink.open(run_dir, config, kept))

    def write(self, row: Row) -> None:
        self._try("while it took a row", lambda: self.sink.write(row))

    def close(self, run_dir: Path) -> str | None:
        return self._try("at the end", lambda: self.sink.close(run_dir))

    def _try(self, when: str, call: Callable[[], T]) -> T | None:
        try:
            return None if self.failed else call()
        except Exception as error:  # a service can fail in any way, and the rows are safe without it
            self._give_up(when, error)
            return None

    def _give_up(self, when: str, error: Exception) -> None:
        self.failed = True
        reason = (str(error).splitlines() or [""])[0]
        log.warning(
            "%s failed %s (%s: %s) and gets no more rows. They are in %s. %s",
            type(self.sink).__name__,
            when,
            type(error).__name__,
            reason,
            self.run_dir,
            self.sink.send_later(self.run_dir),
        )
        self.sink.abandon()
