"""A scheduler state that survives kill -9: a snapshot, and a journal of the events after it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kvmem.errors import DamagedFileError, KVMemWarning, StorageError
from kvmem.storage import replacing, write_all

VERSION = 1


class Journal:
    """Appends events and replaces them by snapshots of the state.

    `append` is one small write that survives the end of the process, but not a crash of the machine. `snapshot` is
    fsynced and empties the journal. Each event carries the number of the snapshot that it follows. If a process dies
    between writing a snapshot and emptying the journal, the events that the snapshot already contains are skipped.

    Damaged content is moved to a file beside it (`state.json.damaged`, `events.jsonl.damaged`), a KVMemWarning says so,
    and the rest is used.
    """

    def __init__(self, folder: Path) -> None:
        """Raises StorageError if `folder` can't be created or written, or if another process uses it."""
        self.folder = folder
        self._snapshot_path, self._events_path = folder / "state.json", folder / "events.jsonl"
        self._number = 0
        self._lock = FileLock(folder / "journal.lock", timeout=0, thread_local=False)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self._events = open(self._events_path, "a+b", buffering=0)  # noqa: SIM115 - closed by `close`
        except Timeout as error:
            raise StorageError(f"{folder} is another process's. Give this scheduler a folder of its own.") from error
        except OSError as error:
            self._lock.release()
            raise StorageError(f"{folder} can't hold the state ({error}). Give another folder.") from error
        self._torn = False
        """Whether the last line of the journal is incomplete."""
        self.appended = 0
        """Events since the last snapshot."""
        self.missed = 0
        """Events that could not be written since the last snapshot. The next snapshot contains what they changed."""
        self.failure = ""
        """Why the last write failed; "" since the last snapshot."""

    def read(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """The last snapshot (None if there is none) and the events after it. Skips a last line that is incomplete.

        Raises DamagedFileError for a snapshot of another version, and StorageError if a file can't be read.
        """
        try:
            snapshot = self._snapshot_path.read_bytes() if self._snapshot_path.exists() else None
            lines = self._events_path.read_bytes().split(b"\n")
        except OSError as error:
            raise StorageError(f"The state in {self.folder} can't be read ({error}).") from error
        self._torn = bool(lines.pop())
        events, broken = [], []
        for line in filter(None, lines):
            try:
                number, event = json.loads(line)
                if type(number) is not int or type(event) is not dict:
                    raise ValueError(f"an event is a number and an object, not {line[:40]!r}")
                events.append((number, event))
            except (ValueError, TypeError, RecursionError) as error:
                broken.append((line, str(error)))
        if broken:
            self.set_aside_events([line for line, _ in broken], broken[0][1])
        state = None if snapshot is None else self._parsed(snapshot)
        if state is None:  # there is none, or it was set aside; its number is that of the latest events
            self._number = max((number for number, _ in events), default=0)
        return state, [event for number, event in events if number == self._number]

    def _parsed(self, snapshot: bytes) -> dict[str, Any] | None:
        """The state in a snapshot; None if it was damaged and set aside."""
        try:
            saved = json.loads(snapshot)
            version = saved["version"]
            if type(version) is int and version != VERSION:
                raise DamagedFileError(
                    f"{self._snapshot_path} is of version {version}, and this kvmem reads {VERSION}. "
                    "Upgrade kvmem, or delete the file to start without counts."
                )
            number, state = saved["number"], saved["state"]
            if type(version) is not int or type(number) is not int or type(state) is not dict:
                raise ValueError("version and number have to be integers, and state an object")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            self.set_aside_state(f"{type(error).__name__}: {error}")
            return None
        self._number = number
        return state

    def set_aside_state(self, reason: str) -> None:
        """Copies the snapshot to `state.json.damaged` and warns. The snapshot itself stays until the next one."""
        self._set_aside(self._snapshot_path, self._snapshot_path.read_bytes(), reason)

    def set_aside_events(self, lines: Sequence[bytes], reason: str) -> None:
        """Writes these lines of the journal to `events.jsonl.damaged` and warns."""
        self._set_aside(self._events_path, b"".join(line + b"\n" for line in lines), reason)

    def _set_aside(self, path: Path, content: bytes, reason: str) -> None:
        names = (f"{path.name}.damaged{n}" for n in ("", *(f"-{n}" for n in range(2, 1000))))
        aside = path.with_name(next(name for name in names if not path.with_name(name).exists()))
        try:
            aside.write_bytes(content)
            kept = f"The damaged part is in {aside}"
        except OSError as error:
            kept = f"The damaged part could not be set aside ({error})"
        warnings.warn(f"{path} is damaged: {reason}. {kept}, and the rest is used.", KVMemWarning, stacklevel=2)

    def erase_set_aside(self) -> None:
        """Deletes what was set aside: it may hold a text that has to go. Raises StorageError if it can't."""
        try:
            for path in (self._snapshot_path, self._events_path):
                for aside in self.folder.glob(f"{path.name}.damaged*"):
                    aside.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"The damaged files in {self.folder} can't be deleted ({error}).") from error

    def append(self, event: dict[str, Any]) -> None:
        """Writes one event. If the disk refuses, the event is counted in `missed`, a KVMemWarning says so once, and
        what it changed is in the next snapshot."""
        line = json.dumps([self._number, event]).encode() + b"\n"
        end = None
        try:
            end = self._events.seek(0, os.SEEK_END)
            write_all(self._events, memoryview(b"\n" + line if self._torn else line))
            self._torn = False
            self.appended += 1
        except OSError as error:
            if end is not None:
                self._cut_off(end)
            first, self.missed, self.failure = not self.failure, self.missed + 1, str(error)
            if first:
                warnings.warn(
                    f"{self._events_path} can't be written ({error}). Answers go on; the counts are kept in memory and "
                    "are written at the first tick that can. Free some space.",
                    KVMemWarning,
                    stacklevel=2,
                )

    def _cut_off(self, end: int) -> None:
        """Removes what was written of a line that did not fit."""
        try:
            self._events.truncate(end)
        except OSError:
            self._torn = True

    def snapshot(self, state: dict[str, Any]) -> None:
        """Writes `state` atomically and deletes the events that led to it. Raises StorageError if the disk refuses."""
        document = {"version": VERSION, "number": self._number + 1, "state": state}
        with replacing(self._snapshot_path) as file:
            write_all(file, memoryview(json.dumps(document).encode()))
        self._number += 1
        try:
            self._events.truncate(0)
        except OSError as error:
            raise StorageError(f"{self._events_path} can't be emptied ({error}). Its events are skipped.") from error
        self._torn, self.appended, self.missed, self.failure = False, 0, 0, ""

    def close(self) -> None:
        """Leaves the folder to the next process."""
        self._events.close()
        self._lock.release()
