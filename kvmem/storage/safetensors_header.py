"""What stands before the tensors in our safetensors files: where they are, what they are, and their checksums.

Eight bytes of length and a JSON header, as safetensors has it. The header's metadata holds the manifest, the XXH3-128
of each region of the body, and first of all the XXH3-128 of the head itself, taken with its own digits as zeros. So the
head is trusted before the body is read, and then vouches for each part of it: a flipped bit anywhere is refused.
Checksums guard against accidents, not against a forger.

Files written before had one checksum over everything, under another name; they are read and verified as they were.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from kvmem.cache import KVCacheItem, dynamic_cache
from kvmem.errors import DamagedFileError, StorageError
from kvmem.storage import manifest
from kvmem.storage.checksums import DIGEST_BYTES, REGION_BYTES, Regions, count, damaged
from kvmem.storage.parallel_read import Span, read_exactly

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

ALIGN_BYTES = 64
LENGTH_BYTES = 8
NO_CHECKSUM = b"0" * (2 * DIGEST_BYTES)
START = b'{"__metadata__":{"checksum_of_head":"'
REGIONS_KEY = b'"checksums_of_regions":"'
WHOLE_FILE_START = b'{"__metadata__":{"checksum":"'
"""Of a file with one checksum over everything."""


@dataclass(frozen=True)
class Head:
    """The header, and where the body begins. Without `regions` nothing has vouched for it yet, see `check_whole`."""

    fields: dict[str, Any]
    body_at: int
    regions: Regions | None

    @property
    def manifest(self) -> str:
        return self.fields["__metadata__"]["manifest"]

    @property
    def tensors(self) -> dict[str, dict[str, Any]]:
        """By name: dtype, shape, data_offsets (where it starts and ends, in bytes of the body)."""
        return {name: entry for name, entry in self.fields.items() if name != "__metadata__"}

    def names(self, item: int, layers: int) -> list[str]:
        """The names of an item's tensors, in the order in which they lie."""
        return [f"{item}.{layer}.{kind}" for layer in range(layers) for kind in "kv"]

    def span(self, item: int, layers: int) -> Span:
        """Where the item's tensors start and end, in bytes of the body: one behind the other."""
        offsets = [self.fields[name]["data_offsets"] for name in self.names(item, layers)]
        return (offsets[0][0], offsets[-1][1]) if offsets else (0, 0)


def write(path: Path, items: Sequence[KVCacheItem]) -> bytes:
    """The head of a file of `items`, with zeros for all checksums: `sealed` puts them in.

    Raises StorageError for a dtype that safetensors has no name for, or metadata that JSON can't hold.
    """
    tensors: dict[str, Any] = {}
    end = 0
    for i, item in enumerate(items):
        for layer, pair in enumerate(dynamic_cache.layers_of(item.kv_cache)):
            for kind, tensor in zip("kv", pair, strict=True):
                if tensor.dtype not in DTYPE_NAMES:
                    raise StorageError(
                        f"{path}: item {item.kv_cache_id} is of dtype {tensor.dtype}. Known: {', '.join(DTYPES)}."
                    )
                start, end = end, end + tensor.numel() * tensor.element_size()
                tensors[f"{i}.{layer}.{kind}"] = {
                    "dtype": DTYPE_NAMES[tensor.dtype],
                    "shape": list(tensor.shape),
                    "data_offsets": [start, end],
                }
    metadata = {
        "checksum_of_head": NO_CHECKSUM.decode(),
        "region_bytes": str(REGION_BYTES),
        "checksums_of_regions": NO_CHECKSUM.decode() * count(end, REGION_BYTES),
        "manifest": manifest.of_items(items),
    }
    header = json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":")).encode()
    header += b" " * (-(LENGTH_BYTES + len(header)) % ALIGN_BYTES)
    assert header.startswith(START + NO_CHECKSUM)
    return len(header).to_bytes(LENGTH_BYTES, "little") + header


def sealed(head: bytes, digests: Sequence[bytes]) -> bytes:
    """The head with the checksums of the regions in place of their zeros, and then its own."""
    known = head.replace(REGIONS_KEY + NO_CHECKSUM * len(digests), REGIONS_KEY + b"".join(digests).hex().encode(), 1)
    assert len(known) == len(head)
    at = LENGTH_BYTES + len(START)
    return known[:at] + xxhash.xxh3_128_hexdigest(known).encode() + known[at + len(NO_CHECKSUM) :]


def read(file: io.FileIO, path: Path) -> Head:
    """The head of an open file, verified where it has a checksum of its own.

    Raises DamagedFileError for a file that is damaged, or none of ours.
    """
    size = os.fstat(file.fileno()).st_size
    first = bytearray(min(size, LENGTH_BYTES + len(START)))
    read_exactly(file, memoryview(first), 0)
    whole = first[LENGTH_BYTES:].startswith(WHOLE_FILE_START)
    if size < LENGTH_BYTES + len(WHOLE_FILE_START + NO_CHECKSUM):
        raise DamagedFileError(f"{path} is too short for a memory: empty or cut off. Take another copy of it.")
    if not whole and first[LENGTH_BYTES:] != START:
        raise DamagedFileError(
            f"{path} does not start like a memory of kvmem: another kind of file, a later kvmem's, or damaged."
        )
    body_at = LENGTH_BYTES + int.from_bytes(first[:LENGTH_BYTES], "little")
    if body_at > size:
        raise damaged(path)
    head = bytearray(body_at)
    if not read_exactly(file, memoryview(head), 0):
        raise damaged(path)
    if whole:
        try:
            return Head(json.loads(head[LENGTH_BYTES:]), body_at, None)
        except ValueError as error:
            raise DamagedFileError(f"{path} has a damaged header ({error}). Take another copy of the file.") from error
    if not _fits(memoryview(head), START):
        raise damaged(path)
    fields = json.loads(head[LENGTH_BYTES:])
    digests = bytes.fromhex(fields["__metadata__"]["checksums_of_regions"])
    each = tuple(digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES))
    regions = Regions(size - body_at, int(fields["__metadata__"]["region_bytes"]), each)
    if len(regions) != len(each):  # cut off, or bytes behind the end
        raise damaged(path)
    return Head(fields, body_at, regions)


def check_whole(file: memoryview, path: Path) -> None:
    """Raises DamagedFileError unless the one checksum of an older file fits all of it."""
    if not _fits(file, WHOLE_FILE_START):
        raise damaged(path)


def _fits(data: memoryview, start: bytes) -> bool:
    """Whether the digits behind `start` are the checksum of `data`, itself taken as zeros."""
    at = LENGTH_BYTES + len(start)
    behind = at + len(NO_CHECKSUM)
    digest = xxhash.xxh3_128(data[:at])
    digest.update(NO_CHECKSUM)
    digest.update(data[behind:])
    return data[at:behind] == digest.hexdigest().encode()
