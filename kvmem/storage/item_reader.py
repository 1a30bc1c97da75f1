"""Reads one item of a safetensors file into the caller's own memory, region by region, each verified as it arrives.

Nothing is mapped: a file that another program cuts off while it is read is an error, not the end of the process.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from transformers import PreTrainedConfig

from kvmem.cache import ModelFingerprint
from kvmem.errors import DamagedFileError
from kvmem.storage import manifest, parallel_read
from kvmem.storage.base import opened
from kvmem.storage.checksums import Regions, checksum_error, for_each_region
from kvmem.storage.safetensors_file import DTYPES, Header, check_tensors, check_whole_file, names_of, read_header

Target = tuple[int, memoryview]
"""A byte of the body, and the memory for the bytes from there on."""


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

    def read(self, targets: Sequence[Target], before_region: Callable[[int], None] = lambda _: None) -> None:
        """Fills the targets, which are in order and do not overlap, of an item with tensors of one dtype. Each region
        that overlaps a target is read, and verified as it arrives.

        before_region: is called before each region with its size in bytes, in one of several threads. An error that it
        raises ends the read.

        Raises DamagedFileError, or OSError. The targets then hold anything.
        """
        regions = self.header.regions
        if regions is None:
            self._read_older(targets)
        else:
            starts = [at for at, _ in targets]
            wanted = [i for i in range(len(regions)) if _overlapping(targets, starts, *regions.span(i))]

            def read_region(number: int) -> None:
                start, end = regions.span(wanted[number])
                before_region(end - start)
                self._read_region(regions, wanted[number], _overlapping(targets, starts, start, end))

            if wanted:
                for_each_region(read_region, len(wanted))
        if not self.header.is_finite:
            for _, memory in targets:
                if not manifest.is_finite(torch.frombuffer(memory, dtype=self.dtypes[0])):
                    raise DamagedFileError(f"{self.path} holds NaN or infinite values. Extract its memory again.")

    def _read_region(self, regions: Regions, number: int, parts: Sequence[Target]) -> None:
        start, end = regions.span(number)
        covered = sum(len(memory) for _, memory in parts)
        whole = parts if covered == end - start else [(start, memoryview(bytearray(end - start)))]
        digest = xxhash.xxh3_128()
        for at, memory in whole:
            if not parallel_read.read_exactly(self.file, memory, self.header.body_at + at):
                raise checksum_error(self.path)
            digest.update(memory)
        if digest.digest() != regions.digests[number]:
            raise checksum_error(self.path)
        if whole is not parts:
            for at, memory in parts:
                memory[:] = whole[0][1][at - start : at - start + len(memory)]

    def _read_older(self, targets: Sequence[Target]) -> None:
        self.file.seek(0)
        data = memoryview(self.file.readall())
        check_whole_file(data, self.path)
        for at, memory in targets:
            start = self.header.body_at + at
            memory[:] = data[start : start + len(memory)]


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


def _overlapping(targets: Sequence[Target], starts: Sequence[int], start: int, end: int) -> list[Target]:
    """The parts of the targets, which begin at `starts`, between two bytes of the body, in order."""
    parts = []
    for at, memory in targets[max(bisect_right(starts, start) - 1, 0) : bisect_right(starts, end)]:
        low, high = max(start, at), min(end, at + len(memory))
        if low < high:
            parts.append((low, memory[low - at : high - at]))
    return parts
