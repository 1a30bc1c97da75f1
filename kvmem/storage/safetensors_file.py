"""The default format: a safetensors file with a manifest and checksums, mapped and not read.

Any safetensors reader can open it: tensors `<item>.<layer>.k` and `.v`, (1, kv_heads, tokens, head_dim), an item's one
behind the other; what stands before them is in `safetensors_head`.
"""

from __future__ import annotations

import io
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from kvmem import dynamic_cache
from kvmem.errors import DamagedFileError, StorageError
from kvmem.fingerprint import ModelFingerprint
from kvmem.items import KVCacheItem
from kvmem.storage import Storage, manifest, safetensors_head, staging
from kvmem.storage.atomic import replacing, write_all
from kvmem.storage.hashing import HashingWriter
from kvmem.storage.regions import RegionHash
from kvmem.storage.safetensors_head import DTYPES, Head
from kvmem.storage.staging import Span


class SafetensorsFile(Storage):
    """Dump streams the tensors from where they are; load maps the file, so its pages are the tensors.

    On a GPU an item's tensors are views of one allocation. On a CPU a loaded tensor stays right when the file is
    dumped again or deleted, because a dump never writes into a file that is in use: it puts a new one in its place.
    Writing into a loaded tensor changes neither the file nor other readers.
    """

    name = "safetensors"
    suffixes = (".safetensors",)

    def dump(self, path: Path, items: Sequence[KVCacheItem]) -> None:
        # Written here and not by safetensors' own writer, which wants every tensor contiguous and on the CPU before it
        # starts, and leaves no place to hash the bytes on their way.
        head = safetensors_head.write(path, items)
        regions = RegionHash()
        with replacing(path) as file:
            write_all(file, memoryview(head))
            with HashingWriter(file, regions) as writer:
                for item in items:
                    for tensor in manifest.tensors_of(item):
                        writer.write(manifest.tight_cpu(tensor).reshape(-1).view(torch.uint8).numpy())
            file.seek(0)
            write_all(file, memoryview(safetensors_head.sealed(head, regions.digests())))

    def load(
        self, path: Path, fingerprint: ModelFingerprint, config: PreTrainedConfig, device: torch.device
    ) -> list[KVCacheItem]:
        with _opened(path) as file:
            head = safetensors_head.read(file, path)
            mapping = _map(file) if head.regions is None or device.type == "cpu" else None
            if mapping is not None and head.regions is None:
                safetensors_head.check_whole(memoryview(mapping), path)
            contents = manifest.read(head.manifest, path)
            manifest.check_model(contents, fingerprint, path)
            spans = [head.span(i, entry.layers) for i, entry in enumerate(contents.items)]
            if mapping is not None:
                parts = _mapped(mapping, head, spans, device, path)
            else:
                assert head.regions is not None
                parts = staging.read(file, head.body_at, head.regions, spans, device, path)
        items = []
        for i, (entry, part, (start, _)) in enumerate(zip(contents.items, parts, spans, strict=True)):
            layers = [
                (_tensor(part, head.fields[f"{i}.{layer}.k"], start),
                 _tensor(part, head.fields[f"{i}.{layer}.v"], start))
                for layer in range(entry.layers)
            ]  # fmt: skip
            if entry.metadata.fingerprint is None:
                manifest.check_shape(entry.kv_cache_id, layers, fingerprint, path)
            cache = dynamic_cache.from_layers(layers, config, entry.cache_tokens)
            items.append(KVCacheItem(cache, entry.metadata, entry.kv_cache_id))
        return items


def read_token_ids(path: Path) -> tuple[int, ...]:
    """The token ids of a file's first item, from its head alone: quick.

    Raises StorageError for a file that can't be read, or whose head is damaged (which an older file's, without a
    checksum of its own, may be unnoticed).
    """
    with _opened(path) as file:
        head = safetensors_head.read(file, path)
    try:
        text = head.manifest
    except KeyError as error:
        raise DamagedFileError(f"{path} has a damaged header ({error}). Take another copy of the file.") from error
    items = manifest.read(text, path).items
    if not items:
        raise DamagedFileError(f"{path} holds no item. Dump a memory there first.")
    return items[0].metadata.tokens.token_ids


@contextmanager
def _opened(path: Path) -> Iterator[io.FileIO]:
    try:
        with open(path, "rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise StorageError(f"{path} can't be read ({error}). Dump a memory there, or give another folder.") from error


def _map(file: io.FileIO) -> mmap.mmap:
    """The whole file, copy-on-write. It stays open as long as a tensor is on it."""
    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    mapping.madvise(mmap.MADV_WILLNEED)
    return mapping


def _mapped(
    mapping: mmap.mmap, head: Head, spans: Sequence[Span], device: torch.device, path: Path
) -> list[torch.Tensor]:
    """Each span of the body as bytes: a view of the mapping on a CPU, else a copy on `device`; verified."""
    if head.regions is not None:
        head.regions.check_all(memoryview(mapping)[head.body_at :], path)
    if len(mapping) == head.body_at:
        return [torch.empty(0, dtype=torch.uint8, device=device) for _ in spans]
    body_N = torch.frombuffer(mapping, dtype=torch.uint8, offset=head.body_at)
    return [body_N[start:end].to(device) for start, end in spans]


def _tensor(part_N: torch.Tensor, entry: dict[str, Any], part_at: int) -> torch.Tensor:
    """One tensor of an item whose bytes are `part_N`, from byte `part_at` of the body on: a view."""
    start, end = entry["data_offsets"]
    dtype = DTYPES[entry["dtype"]]
    raw_N = part_N[start - part_at : end - part_at]
    if raw_N.storage_offset() % dtype.itemsize:  # behind an odd number of narrower elements
        raw_N = raw_N.clone()
    return raw_N.view(dtype).view(entry["shape"])
