"""One item of a safetensors file, to be read into the caller's own memory: what to read where, and what to verify.

Nothing is mapped: a file that another program cuts off while it is read is an error, not the end of the process.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from kvmem.cache import ModelFingerprint
from kvmem.errors import CompactionError, DamagedFileError
from kvmem.storage import manifest
from kvmem.storage.base import opened
from kvmem.storage.region_reads import Part, RegionRead
from kvmem.storage.safetensors_file import DTYPES, Header, check_tensors, check_whole_file, names_of, read_header


class Target(NamedTuple):
    """Bytes of the body, and where they go in the memory."""

    at: int
    memory_at: int
    nbytes: int


@dataclass(frozen=True)
class ItemHead:
    """What a file states about its first item."""

    checksum: str
    """Differs between files of different content."""
    token_ids: tuple[int, ...]
    kv_bytes: int
    """Size of all keys and values in the file."""
    entry: manifest.ItemManifest

    @property
    def is_plain(self) -> bool:
        """Whether the file states that its keys and values are those of a plain prefill of its tokens: a known model
        built them, and neither a merge nor a lossy form is part of them."""
        known = self.entry.metadata
        return known.fingerprint is not None and not known.lossy and not known.tokens.lead_ids


def read_head(path: Path) -> ItemHead:
    """Reads the header only. Raises StorageError for a file that can't be read, or whose header is damaged.

    In an older file, whose header has no checksum of its own, damage may go unnoticed.
    """
    with opened(path) as file:
        header = read_header(file, path)
    entry = _items(header, path)[0]
    kv_bytes = max((tensor["data_offsets"][1] for tensor in header.tensors.values()), default=0)
    return ItemHead(header.checksum, entry.metadata.tokens.token_ids, kv_bytes, entry)


class ItemReader:
    """The first item of an open file, whose header is verified and is that of this model.

    Its tensors are numbered in the order of their bytes, layer by layer, where they are adjacent.
    """

    def __init__(self, file: io.FileIO, path: Path, fingerprint: ModelFingerprint, config: PreTrainedConfig) -> None:
        self.file, self.path = file, path
        self.header = read_header(file, path)
        contents = manifest.from_json(self.header.manifest, path)
        manifest.check_model(contents, fingerprint, path)
        check_tensors(self.header, contents, fingerprint, config, path)
        self.entry = _items(self.header, path)[0]
        if self.entry.metadata.compaction is not None:
            raise CompactionError(
                f"{path} holds a memory that is {self.entry.metadata.lossy}, and an engine that injects files needs an "
                "entry for each token. Use backend=huggingface for it, or extract without compaction."
            )
        tensors = [self.header.fields[name] for name in names_of(0, self.entry.names)]
        self.shapes: list[tuple[int, ...]] = [tuple(tensor["shape"]) for tensor in tensors]
        """Of each tensor."""
        self.starts: list[int] = [tensor["data_offsets"][0] for tensor in tensors]
        """Of each tensor, in bytes from the start of the body."""
        self.dtypes = [DTYPES[tensor["dtype"]] for tensor in tensors]
        if self.entry.metadata.fingerprint is None:
            made = (
                torch.empty(shape, dtype=dtype, device="meta")
                for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
            )
            layers = [{name: next(made) for name in names} for names in self.entry.names]
            manifest.check_unverified(self.entry, layers, fingerprint, config, path)

    def regions(self, targets: Sequence[Target]) -> list[RegionRead]:
        """What to read so that the targets are filled, which are in order and do not overlap: each region that overlaps
        one. Empty for an older file, which `finish` reads."""
        regions = self.header.regions
        if regions is None:
            return []
        starts = [target.at for target in targets]
        reads = []
        for number in range(len(regions)):
            start, end = regions.span(number)
            parts = _overlapping(targets, starts, start, end)
            if parts:
                reads.append(RegionRead(self.header.body_at + start, end - start, regions.digests[number], parts))
        return reads

    def finish(self, targets: Sequence[Target], memory: memoryview) -> None:
        """Verifies what only the whole item tells, once its regions have been read. Raises DamagedFileError, or
        OSError."""
        if self.header.regions is None:
            self._read_older(targets, memory)
        if not self.header.is_finite:
            for target in targets:
                values = torch.frombuffer(
                    memory,
                    dtype=self.dtypes[0],
                    count=target.nbytes // self.dtypes[0].itemsize,
                    offset=target.memory_at,
                )
                if not manifest.is_finite(values):
                    raise DamagedFileError(f"{self.path} holds NaN or infinite values. Extract its memory again.")

    def _read_older(self, targets: Sequence[Target], memory: memoryview) -> None:
        self.file.seek(0)
        data = memoryview(self.file.readall())
        check_whole_file(data, self.path)
        for at, memory_at, nbytes in targets:
            start = self.header.body_at + at
            memory[memory_at : memory_at + nbytes] = data[start : start + nbytes]


@contextmanager
def opened_item(path: Path, fingerprint: ModelFingerprint, config: PreTrainedConfig) -> Iterator[ItemReader]:
    """The first item of a file. Raises StorageError for a file that can't be read or is damaged, and FingerprintError
    for one of another model."""
    with opened(path) as file:
        yield ItemReader(file, path, fingerprint, config)


def _items(header: Header, path: Path) -> Sequence[manifest.ItemManifest]:
    items = manifest.from_json(header.manifest, path).items
    if not items:
        raise DamagedFileError(f"{path} holds no item. Dump a memory there first.")
    return items


def _overlapping(targets: Sequence[Target], starts: Sequence[int], start: int, end: int) -> tuple[Part, ...]:
    """The parts of the targets, which begin at `starts`, between two bytes of the body, in order."""
    parts = []
    for at, memory_at, nbytes in targets[max(bisect_right(starts, start) - 1, 0) : bisect_right(starts, end)]:
        low, high = max(start, at), min(end, at + nbytes)
        if low < high:
            parts.append(Part(low - start, memory_at + low - at, high - low))
    return tuple(parts)
