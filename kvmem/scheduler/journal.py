"""A scheduler state that survives kill -9: a snapshot, and a journal of the events after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kvmem.errors import DamagedFileError, StorageError
from kvmem.storage import replacing, write_all

VERSION = 1


class Journal:
    """Appends events and replaces them by snapshots of the state.

    `append` is one small write that survives the end of the process, but not a crash of the machine. `snapshot` is
    fsynced and empties the journal. Each event carries the number of the snapshot that it follows. If a process dies
    between writing a snapshot and emptying the journal, the events that the snapshot already contains are skipped.
    """

    def __init__(self, folder: Path) -> None:
        """Raises StorageError if `folder` can't be created or written, or if another process uses it."""
        self._snapshot_path, self._events_path = folder / "state.json", folder / "events.jsonl"
        self._number = 0
        self._lock = FileLock(folder / "journal.lock", timeout=0, thread_local=False)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self._events = open(self._events_path, "ab", buffering=0)  # noqa: SIM115 - closed by `close`
        except Timeout as error:
            raise StorageError(f"{folder} is another process's. Give this scheduler a folder of its own.") from error
        except OSError as error:
            self._lock.release()
            raise StorageError(f"{folder} can't hold the state ({error}). Give another folder.") from error
        self.appended = 0
        """Events since the last snapshot."""

    def read(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """The last snapshot (None if there is none) and the events after it. Skips a last line that is incomplete.

        Raises DamagedFileError for a snapshot that can't be parsed or has another version.
        """
        state = None
        if self._snapshot_path.exists():
            try:
                saved = json.loads(self._snapshot_path.read_bytes())
            except json.JSONDecodeError as error:
                raise DamagedFileError(
                    f"{self._snapshot_path} is damaged ({error}). Delete it to start without counts."
                ) from error
            if saved.get("version") != VERSION:
                raise DamagedFileError(
                    f"{self._snapshot_path} is of version {saved.get('version')}, and this kvmem reads {VERSION}. "
                    "Upgrade kvmem, or delete the file to start without counts."
                )
            self._number, state = saved["number"], saved["state"]
        complete = self._events_path.read_bytes().rpartition(b"\n")[0]
        numbered = [json.loads(line) for line in complete.splitlines()]
        return state, [event for number, event in numbered if number == self._number]

    def append(self, event: dict[str, Any]) -> None:
        self._events.write(json.dumps([self._number, event]).encode() + b"\n")
        self.appended += 1

    def snapshot(self, state: dict[str, Any]) -> None:
        """Writes `state` atomically and deletes the events that led to it."""
        document = {"version": VERSION, "number": self._number + 1, "state": state}
        with replacing(self._snapshot_path) as file:
            write_all(file, memoryview(json.dumps(document).encode()))
        self._number += 1
        self._events.truncate(0)
        self.appended = 0

    def close(self) -> None:
        """Leaves the folder to the next process."""
        self._events.close()
        self._lock.release()
