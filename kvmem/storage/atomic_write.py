"""A file that is the old one or the new one, whatever happens in between."""

from __future__ import annotations

import fcntl
import io
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvmem.errors import StorageError


@contextmanager
def replacing(path: Path) -> Iterator[io.FileIO]:
    """A new unbuffered file beside `path` that takes its place when the block ends well: fsynced and renamed.

    If the block raises, the new file goes and `path` stays as it was. If the process dies, `path` stays as it was and
    the next write removes what is left: a partial file is locked as long as its writer lives.
    Raises StorageError for what the file system refuses (no space, no right, no folder).
    """
    target = path.resolve()  # where `path` is a link, the file behind it is replaced and the link stays
    try:
        _remove_leftovers(target)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
        try:
            with open(partial, "x+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file
                os.fsync(file.fileno())
                os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        _fsync_folder(target.parent)
    except OSError as error:
        raise StorageError(f"{path} can't be written ({error}). A file that was there before is as it was.") from error


def write_all(file: io.FileIO, data: memoryview) -> None:
    """Writes every byte: one call of an unbuffered file may write less (Linux stops at 2 GiB)."""
    while data:
        data = data[file.write(data) :]


def _remove_leftovers(target: Path) -> None:
    for partial in target.parent.glob(f".{target.name}.*.partial"):
        with open(partial, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # another process is writing it
            partial.unlink(missing_ok=True)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
