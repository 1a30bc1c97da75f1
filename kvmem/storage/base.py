"""One file format, one file. The suffix of `memory_filename` picks it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import ClassVar

import torch
from transformers import PreTrainedConfig

from kvmem.cache import KVCacheItem, ModelFingerprint
from kvmem.errors import ConfigError, did_you_mean
from kvmem.registry import Registry


class Storage(ABC):
    """Writes and reads all items of a memory as one file."""

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]

    @abstractmethod
    def dump(self, path: Path, items: Sequence[KVCacheItem]) -> None:
        """Writes `items` beside `path`, fsyncs, and renames: after a crash `path` is the old file or the new one."""

    @abstractmethod
    def load(
        self, path: Path, fingerprint: ModelFingerprint, config: PreTrainedConfig, device: torch.device
    ) -> list[KVCacheItem]:
        """Reads all items, or raises a StorageError (damaged, unsafe, future version) or FingerprintError that names
        the file and the reason. Checks format version, fingerprint and checksum before anything is returned."""


FORMATS = Registry(Storage, "kvmem.storage", "file format")


def for_filename(filename: str) -> Storage:
    """The format whose suffix `filename` has.

    Raises ConfigError for another suffix, and for what is no file below the folder that it will be put into.
    """
    path = PurePath(filename)
    if path.is_absolute() or ".." in path.parts or filename.endswith("/") or "\0" in filename:
        raise ConfigError(
            f"memory_filename {filename!r} is no file below the folder that dump and load are given. "
            "Give a name, as 'activation_memory.safetensors', and say where it is to be in dump and load."
        )
    formats = FORMATS.classes()
    by_suffix = {suffix: cls for cls in formats.values() for suffix in cls.suffixes}
    suffix = path.suffix
    if suffix not in by_suffix:
        raise ConfigError(
            f"memory_filename {filename!r} has an unknown suffix {suffix!r}. {did_you_mean(suffix, by_suffix)}"
        )
    return by_suffix[suffix]()
