"""The interface of a file format. The suffix of `memory_filename` chooses the format."""

from __future__ import annotations

import io
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import ClassVar

import torch
from transformers import PreTrainedConfig

from kvmem.cache import KVCacheItem, ModelFingerprint
from kvmem.errors import ConfigError, StorageError, did_you_mean
from kvmem.registry import Registry


class Storage(ABC):
    """Writes and reads all items of a memory as one file."""

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    """The suffixes of file names, with the dot."""

    @abstractmethod
    def dump(self, path: Path, items: Sequence[KVCacheItem]) -> None:
        """Writes `items` beside `path`, fsyncs, and renames: after a crash `path` is the old file or the new one.

        Raises StorageError if the file can't be written or the format can't hold an item.
        """

    @abstractmethod
    def load(
        self, path: Path, fingerprint: ModelFingerprint, config: PreTrainedConfig, device: torch.device
    ) -> list[KVCacheItem]:
        """All items of the file, on `device`. Verifies format version, fingerprint and checksum before it returns.

        Raises StorageError (damaged, unsafe, newer version) or FingerprintError, which name the file and the reason.
        """


@contextmanager
def opened(path: Path) -> Iterator[io.FileIO]:
    """The file, open for reading, without a buffer. Raises StorageError if it can't be read or is not a plain file.

    A pipe would keep its reader waiting, and a device may have no end.
    """
    try:
        with open(path, "rb", buffering=0, opener=_open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise StorageError(f"{path} is a pipe, a socket or a device. Give the path of a file.")
            yield file
    except OSError as error:
        raise StorageError(f"{path} can't be read ({error}). Dump a memory there, or give another folder.") from error


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has none


FORMATS = Registry(Storage, "kvmem.storage", "file format")


def for_filename(filename: str) -> Storage:
    """The format of the suffix of `filename`.

    Raises ConfigError for an unknown suffix, or if `filename` is not a relative path to a file.
    """
    path = PurePath(filename)
    if path.is_absolute() or ".." in path.parts or filename.endswith("/") or "\0" in filename:
        raise ConfigError(
            f"memory_filename {filename!r} is not a file below the folder that dump and load take. "
            "Give a name such as 'activation_memory.safetensors', and give the folder to dump and load."
        )
    formats = FORMATS.classes()
    by_suffix = {suffix: cls for cls in formats.values() for suffix in cls.suffixes}
    suffix = path.suffix
    if suffix not in by_suffix:
        raise ConfigError(
            f"memory_filename {filename!r} has an unknown suffix {suffix!r}. {did_you_mean(suffix, by_suffix)}"
        )
    return by_suffix[suffix]()
