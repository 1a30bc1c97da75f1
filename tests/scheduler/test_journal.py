"""The journal: one process at a time, and nothing is lost between a snapshot and the events after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmem.errors import DamagedFileError, StorageError
from kvmem.scheduler.journal import Journal


def test_events_follow_their_snapshot(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append({"n": 1})
    journal.snapshot({"counted": 1})
    journal.append({"n": 2})
    journal.close()
    with open(tmp_path / "events.jsonl", "ab") as file:
        file.write(b'[1, {"n": 3')  # a write that was cut off
    again = Journal(tmp_path)
    assert again.read() == ({"counted": 1}, [{"n": 2}])
    again.close()


def test_events_that_a_snapshot_holds_are_skipped(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append({"n": 1})
    before = (tmp_path / "events.jsonl").read_bytes()
    journal.snapshot({"counted": 1})
    journal.close()
    (tmp_path / "events.jsonl").write_bytes(before)  # as if the process had ended before the journal was emptied
    again = Journal(tmp_path)
    assert again.read() == ({"counted": 1}, [])
    again.close()


def test_a_folder_has_one_journal_at_a_time(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    with pytest.raises(StorageError, match="another process's"):
        Journal(tmp_path)
    first.append({"n": 1})
    first.close()
    again = Journal(tmp_path)
    assert again.read() == (None, [{"n": 1}])
    again.close()


def test_a_state_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"version": 99}')
    journal = Journal(tmp_path)
    with pytest.raises(DamagedFileError, match="version 99"):
        journal.read()
    journal.close()
