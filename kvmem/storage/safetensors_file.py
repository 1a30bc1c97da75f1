"""The default format: a safetensors file with a manifest and checksums, which a CPU maps instead of reading.

Any safetensors reader can open it. Its tensors are `<item>.<layer>.k` and `.v`, (1, kv_heads, tokens, head_dim), or by
other names what a layer keeps instead: the states `conv.0` and `recurrent.0`, or the entries `indexer` of sparse
attention. The tensors of an item are adjacent. Before them are, as in every safetensors file, eight bytes with the
length of a JSON header and the header. The header's metadata holds:

- `checksum_of_head`: XXH3-128 of length and header, computed with zeros in place of its own digits;
- `region_bytes` and `checksums_of_regions`: XXH3-128 of each region of the body;
- `manifest`: everything about the items but their tensors;
- `finite`: "true" if the writer made sure that no value is NaN or infinite. Without it, a reader looks.

The header is verified before the body is read, and then each region of the body against the header, so a flipped bit
anywhere is refused. Checksums protect against accidents, not against a forger.

Older files have one checksum over the whole file, `checksum`. They are read and verified too.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import PreTrainedConfig

from kvmem.cache import KVCacheItem, MappedFile, ModelFingerprint, dynamic_cache
from kvmem.errors import DamagedFileError, StorageError
from kvmem.storage import manifest, parallel_read
from kvmem.storage.atomic_write import HashingWriter, replacing, write_all
from kvmem.storage.base import Storage, opened
from kvmem.storage.checksums import DIGEST_BYTES, REGION_BYTES, RegionHash, Regions, checksum_error, region_count
from kvmem.storage.region_reads import read_exactly

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
MOST_HEADER_BYTES = 100_000_000
"""The safetensors package's own limit."""
MOST_NUMBERS = 1 << 31
"""The largest size of a tensor's dimension."""
MOST_DIMENSIONS = 8
NO_CHECKSUM = b"0" * (2 * DIGEST_BYTES)
START = b'{"__metadata__":{"checksum_of_head":"'
FINITE = "finite"
REGIONS_KEY = b'"checksums_of_regions":"'
WHOLE_FILE_START = b'{"__metadata__":{"checksum":"'
"""The start of an older file's header, with one checksum over the whole file."""


class SafetensorsFile(Storage):
    """`dump` streams the tensors from where they are. `load` on a CPU maps the file, so its pages are the tensors.

    On a GPU the tensors of an item are views of one allocation. On a CPU a loaded tensor stays valid when the file is
    dumped again or deleted, because a dump replaces the file and never writes into it. Writing into a loaded tensor
    changes neither the file nor other readers.
    """

    name = "safetensors"
    suffixes = (".safetensors",)

    def dump(self, path: Path, items: Sequence[KVCacheItem]) -> None:
        for item in items:
            manifest.check_finite(item, path)
        # The writer of the safetensors package needs every tensor contiguous and on the CPU before it starts, and does
        # not hash the bytes while it writes them.
        header = _header_without_checksums(path, items)
        regions = RegionHash()
        with replacing(path) as file:
            write_all(file, memoryview(header))
            with HashingWriter(file, regions) as writer:
                for item in items:
                    for tensor in manifest.tensors_of(item):
                        writer.write(manifest.contiguous_on_cpu(tensor).reshape(-1).view(torch.uint8).numpy())
            file.seek(0)
            write_all(file, memoryview(_with_checksums(header, regions.digests())))

    def load(
        self, path: Path, fingerprint: ModelFingerprint, config: PreTrainedConfig, device: torch.device
    ) -> list[KVCacheItem]:
        with opened(path) as file:
            header = read_header(file, path)
            mapped = _mapped(file, header, path) if header.regions is None else None  # verifies the header too
            contents = manifest.from_json(header.manifest, path)
            manifest.check_model(contents, fingerprint, path)
            check_tensors(header, contents, fingerprint, config, path)
            if mapped is None and device.type == "cpu":
                mapped = _mapped(file, header, path)
            if mapped is not None:
                tensors = _mapped_tensors(mapped, header, device)
            else:
                tensors = read_tensors(file, header, [entry.names for entry in contents.items], device, path)
        items = []
        for i, entry in enumerate(contents.items):
            kept = [{name: tensors[_name(i, layer, name)] for name in names} for layer, names in enumerate(entry.names)]
            if entry.metadata.fingerprint is None:
                manifest.check_unverified(entry, kept, fingerprint, config, path)
            if done := entry.metadata.compaction:
                cache = dynamic_cache.from_compacted(kept, done.entries, entry.cache_tokens)
            else:
                cache = dynamic_cache.from_contents(kept, config, entry.cache_tokens)
            items.append(KVCacheItem(cache, entry.metadata, entry.kv_cache_id))
            if not header.is_finite:
                manifest.check_finite(items[-1], path, DamagedFileError)
        return items


Kept = Sequence[Sequence[str]]
"""The names of each layer's tensors."""


def _name(item: int, layer: int, kept: str) -> str:
    return f"{item}.{layer}.{kept}"


def names_of(item: int, kept: Kept) -> list[str]:
    """The names of an item's tensors in the file, in the order of their bytes."""
    return [_name(item, layer, name) for layer, names in enumerate(kept) for name in names]


@dataclass(frozen=True)
class Header:
    """The JSON header, and the byte at which the body begins.

    `regions` is None in an older file, whose header is not verified yet: the checksum covers the whole file.
    """

    fields: dict[str, Any]
    body_at: int
    regions: Regions | None

    @property
    def manifest(self) -> str:
        text: str = self.fields["__metadata__"]["manifest"]
        return text

    @property
    def checksum(self) -> str:
        """The checksum that the header states: its own, and so that of the whole content; or an older file's."""
        stated: dict[str, str] = self.fields["__metadata__"]
        return stated["checksum" if self.regions is None else "checksum_of_head"]

    @property
    def is_finite(self) -> bool:
        """Whether the file's writer made sure that no value is NaN or infinite."""
        stated: str = self.fields["__metadata__"].get(FINITE, "")
        return stated == "true"

    @property
    def tensors(self) -> dict[str, dict[str, Any]]:
        """By name: dtype, shape, and data_offsets (start and end, in bytes from the start of the body)."""
        return {name: entry for name, entry in self.fields.items() if name != "__metadata__"}

    def span(self, item: int, kept: Kept) -> parallel_read.Span:
        """Start and end of an item's adjacent tensors, in bytes from the start of the body."""
        offsets = [self.fields[name]["data_offsets"] for name in names_of(item, kept)]
        return (offsets[0][0], offsets[-1][1]) if offsets else (0, 0)


def read_header(file: io.FileIO, path: Path) -> Header:
    """The header of an open file, verified if it has a checksum of its own.

    Raises DamagedFileError for a file that is damaged or not one of kvmem.
    """
    size = os.fstat(file.fileno()).st_size
    start = bytearray(min(size, LENGTH_BYTES + len(START)))
    read_exactly(file.fileno(), memoryview(start), 0)
    is_older = start[LENGTH_BYTES:].startswith(WHOLE_FILE_START)
    if size < LENGTH_BYTES + len(WHOLE_FILE_START + NO_CHECKSUM):
        raise DamagedFileError(f"{path} is too short for a memory: empty or cut off. Take another copy of it.")
    if not is_older and start[LENGTH_BYTES:] != START:
        raise DamagedFileError(
            f"{path} does not start like a memory of kvmem: another kind of file, a later kvmem's, or damaged."
        )
    body_at = LENGTH_BYTES + int.from_bytes(start[:LENGTH_BYTES], "little")
    if body_at > min(size, LENGTH_BYTES + MOST_HEADER_BYTES):
        raise checksum_error(path)
    raw = bytearray(body_at)
    if not read_exactly(file.fileno(), memoryview(raw), 0):
        raise checksum_error(path)
    if not is_older and not _has_checksum(memoryview(raw), START):
        raise checksum_error(path)
    try:
        fields = json.loads(raw[LENGTH_BYTES:])
        _check_fields(fields, size - body_at)
        return Header(fields, body_at, None if is_older else _regions(fields["__metadata__"], size - body_at))
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise DamagedFileError(f"{path} has a damaged header ({error}). Take another copy of the file.") from error


def _regions(metadata: dict[str, str], body_bytes: int) -> Regions:
    """The checksums of the body. Raises ValueError or KeyError if they can't be those of so many bytes."""
    region_bytes = int(metadata["region_bytes"])
    digests = bytes.fromhex(metadata["checksums_of_regions"])
    by_region = tuple(digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES))
    # The file was cut off, or has bytes behind its end, or claims regions that its bytes do not fill.
    if region_bytes < 1 or len(by_region) != region_count(body_bytes, region_bytes):
        raise ValueError(f"{len(by_region)} checksums for {body_bytes} bytes")
    return Regions(body_bytes, region_bytes, by_region)


def _check_fields(fields: Any, body_bytes: int) -> None:
    """Raises ValueError, LookupError or TypeError unless the header is well-formed and its tensors fill the body.

    Nothing is allocated for a size that the header states before this has passed.
    """
    metadata = fields["__metadata__"]
    if not isinstance(metadata["manifest"], str) or not all(isinstance(value, str) for value in metadata.values()):
        raise TypeError("metadata that is not text")
    end = 0
    for name, entry in fields.items():
        if name == "__metadata__":
            continue
        shape, (start, stop) = entry["shape"], entry["data_offsets"]
        if not 1 <= len(shape) <= MOST_DIMENSIONS or not all(
            type(number) is int and number >= 0 for number in (*shape, start, stop)
        ):
            raise ValueError(f"{name} has a shape or a place that is none")
        if max(shape) > MOST_NUMBERS:  # of an empty tensor, which fits anywhere
            raise ValueError(f"{name} has the shape {shape}")
        if start != end or stop - start != math.prod(shape) * DTYPES[entry["dtype"]].itemsize:
            raise ValueError(f"{name}, of shape {shape} and dtype {entry['dtype']}, does not fill its bytes")
        end = stop
    if end != body_bytes:
        raise ValueError(f"tensors of {end} bytes in {body_bytes}: its checksums can't fit")


def check_tensors(
    header: Header, contents: manifest.Manifest, model: ModelFingerprint, config: PreTrainedConfig, path: Path
) -> None:
    """Raises DamagedFileError unless the file's tensors are those that its manifest states, and in that order."""
    tensors = header.tensors
    if sum(entry.tensor_count for entry in contents.items) != len(tensors):
        raise DamagedFileError(
            f"{path} holds {len(tensors)} tensors, and its manifest states another number. Take another copy of it."
        )
    names = [name for i, entry in enumerate(contents.items) for name in names_of(i, entry.names)]
    if names != list(tensors):
        raise DamagedFileError(f"{path} holds tensors with names of another format. Take another copy of it.")
    layouts = iter([(DTYPES[entry["dtype"]], tuple(entry["shape"])) for entry in tensors.values()])
    for entry in contents.items:
        own = list(islice(layouts, entry.tensor_count))
        if entry.metadata.fingerprint is not None:
            manifest.check_tensors(entry, own, model, config, path)


def read_tensors(
    file: io.FileIO, header: Header, kept: Sequence[Kept], device: torch.device, path: Path
) -> dict[str, torch.Tensor]:
    """All tensors by name, verified: for each item views of one allocation on `device`.

    kept: for each item, the names of each layer's tensors.
    """
    assert header.regions is not None
    spans = [header.span(i, names) for i, names in enumerate(kept)]
    parts = parallel_read.read(file, header.body_at, header.regions, spans, device, path)
    tensors, entries = {}, header.tensors
    for i, (part_N, (at, _)) in enumerate(zip(parts, spans, strict=True)):
        for name in names_of(i, kept[i]):
            entry = entries[name]
            start, end = entry["data_offsets"]
            dtype, raw_N = DTYPES[entry["dtype"]], part_N[start - at : end - at]
            if raw_N.storage_offset() % dtype.itemsize:  # unaligned, behind an odd number of narrower elements
                raw_N = raw_N.clone()
            tensors[name] = raw_N.view(dtype).view(entry["shape"])
    return tensors


def _header_without_checksums(path: Path, items: Sequence[KVCacheItem]) -> bytes:
    """Length and header for `items`, with zeros in place of all checksums.

    Raises StorageError for a dtype that safetensors has no name for, or metadata that JSON can't represent.
    """
    tensors: dict[str, Any] = {}
    end = 0
    for i, item in enumerate(items):
        for layer, kept in enumerate(dynamic_cache.contents_of(item.kv_cache)):
            for kind, tensor in kept.items():
                if tensor.dtype not in DTYPE_NAMES:
                    raise StorageError(
                        f"{path}: item {item.kv_cache_id} is of dtype {tensor.dtype}. Known: {', '.join(DTYPES)}."
                    )
                start, end = end, end + tensor.numel() * tensor.element_size()
                tensors[_name(i, layer, kind)] = {
                    "dtype": DTYPE_NAMES[tensor.dtype],
                    "shape": list(tensor.shape),
                    "data_offsets": [start, end],
                }
    metadata = {
        "checksum_of_head": NO_CHECKSUM.decode(),
        "region_bytes": str(REGION_BYTES),
        "checksums_of_regions": NO_CHECKSUM.decode() * region_count(end, REGION_BYTES),
        "manifest": manifest.to_json(items),
        FINITE: "true",
    }
    header = json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":")).encode()
    header += b" " * (-(LENGTH_BYTES + len(header)) % ALIGN_BYTES)
    assert header.startswith(START + NO_CHECKSUM)
    return len(header).to_bytes(LENGTH_BYTES, "little") + header


def _with_checksums(header: bytes, digests: Sequence[bytes]) -> bytes:
    """The header with the checksums of the regions, and then its own, in place of the zeros."""
    zeros, digits = NO_CHECKSUM * len(digests), b"".join(digests).hex().encode()
    filled = header.replace(REGIONS_KEY + zeros, REGIONS_KEY + digits, 1)
    assert len(filled) == len(header)
    at = LENGTH_BYTES + len(START)
    return filled[:at] + xxhash.xxh3_128_hexdigest(filled).encode() + filled[at + len(NO_CHECKSUM) :]


def check_whole_file(file: memoryview, path: Path) -> None:
    """Raises DamagedFileError unless an older file has its one checksum."""
    if not _has_checksum(file, WHOLE_FILE_START):
        raise checksum_error(path)


def _has_checksum(data: memoryview, start: bytes) -> bool:
    """Whether the digits after `start` are the checksum of `data`, computed with zeros in place of the digits."""
    at = LENGTH_BYTES + len(start)
    end = at + len(NO_CHECKSUM)
    digest = xxhash.xxh3_128(data[:at])
    digest.update(NO_CHECKSUM)
    digest.update(data[end:])
    return data[at:end] == digest.hexdigest().encode()


def _mapped(file: io.FileIO, header: Header, path: Path) -> MappedFile:
    """The whole file, mapped and verified."""

    def verify(data: memoryview) -> None:
        if header.regions is None:
            check_whole_file(data, path)
        else:
            header.regions.check_all(data[header.body_at :], path)

    return MappedFile.verified(file.fileno(), path, verify)


def _mapped_tensors(mapped: MappedFile, header: Header, device: torch.device) -> dict[str, torch.Tensor]:
    """All tensors by name: views of the mapping on a CPU, else copies on `device`."""
    tensors = {}
    for name, entry in header.tensors.items():
        at = header.body_at + entry["data_offsets"][0]
        tensors[name] = mapped.tensor(DTYPES[entry["dtype"]], entry["shape"], at).to(device)
    return tensors
