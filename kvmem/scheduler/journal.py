"""A state that survives kill -9: a snapshot, and a journal of what came after it."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

from kvmem.errors import DamagedFileError, StorageError
from kvmem.storage import replacing, write_all

VERSION = 1


class Journal:
    """`append` costs one small write, and outlives the process once it returns (not the machine); `snapshot` is
    fsynced, and empties the journal. Snapshots are numbered, and so are the events that follow each: a process that
    dies between the two leaves events that the snapshot already holds, and they are skipped."""

    def __init__(self, folder: Path) -> None:
        """Raises StorageError for a folder that can't be made or written, or that another process has."""
        self._snapshot_path, self._events_path = folder / "state.json", folder / "events.jsonl"
        self._number = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._events = open(self._events_path, "ab", buffering=0)  # noqa: SIM115 - open as long as the journal is
        except OSError as error:
            raise StorageError(f"{folder} can't hold the state ({error}). Give another folder.") from error
        try:
            fcntl.flock(self._events, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(f"{folder} is another process's. Give this scheduler a folder of its own.") from error
        self.appended = 0
        """Events since the last snapshot."""

    def read(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """The last snapshot (None: there is none) and the events after it. A last line that was cut off is left out.

        Raises DamagedFileError for a snapshot that is not one.
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
        whole = self._events_path.read_bytes().rpartition(b"\n")[0]
        numbered = [json.loads(line) for line in whole.splitlines()]
        return state, [event for number, event in numbered if number == self._number]

    def append(self, event: dict[str, Any]) -> None:
        self._events.write(json.dumps([self._number, event]).encode() + b"\n")
        self.appended += 1

    def snapshot(self, state: dict[str, Any]) -> None:
        """Writes `state`, beside and renamed, and forgets the events that led to it."""
        document = {"version": VERSION, "number": self._number + 1, "state": state}
        with replacing(self._snapshot_path) as file:
            write_all(file, memoryview(json.dumps(document).encode()))
        self._number += 1
        self._events.truncate(0)
        self.appended = 0

    def close(self) -> None:
        self._events.close()
