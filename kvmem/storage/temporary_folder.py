"""Folders for temporary files. What a killed process left is removed when another one makes a folder beside it."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from types import TracebackType

from filelock import FileLock

LOCK = ".kvmem-temporary.lock"
"""In each folder; its process holds it as long as the folder is in use."""
ABANDONED_AFTER_S = 600.0
"""A folder whose lock is free is removed once it is this old: a new one is locked a moment after it is made."""


class TemporaryFolder:
    """A new folder, `path`. `cleanup`, the end of a `with` block, or the end of the last reference to this removes it.

    A process that is killed leaves it. The next process that makes a folder in the same place removes it, unless
    somebody holds its lock.
    """

    def __init__(self, prefix: str, parent: Path | None = None) -> None:
        """prefix: begins with `kvmem-`, so that an abandoned folder is found.
        parent: None: the system's folder for temporary files.

        Raises OSError if the folder can't be made."""
        place = Path(tempfile.gettempdir()) if parent is None else parent
        _sweep(place)
        self._made = tempfile.TemporaryDirectory(prefix=prefix, dir=place, ignore_cleanup_errors=True)
        self.path = Path(self._made.name)
        self._lock = FileLock(self.path / LOCK, timeout=0, thread_local=False)
        self._lock.acquire()

    def cleanup(self) -> None:
        self._lock.release()
        self._made.cleanup()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.cleanup()


def _sweep(place: Path) -> None:
    """Removes the folders in `place` whose process ended without removing them. What can't be removed stays."""
    for lock_path in place.glob(f"kvmem-*/{LOCK}"):
        try:
            if lock_path.parent.is_symlink() or time.time() - lock_path.stat().st_mtime < ABANDONED_AFTER_S:
                continue
            with FileLock(lock_path, timeout=0):
                shutil.rmtree(lock_path.parent, ignore_errors=True)
        except OSError:  # in use (filelock's Timeout is one), another user's, or gone meanwhile
            continue
