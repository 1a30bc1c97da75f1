"""The default format: a safetensors file with a manifest and checksums, mapped and not read.

Any safetensors reader can open it: tensors `<item>.<layer>.k` and `.v`, (1, kv_heads, tokens, head_dim), an item's one
behind the other; what stands before them is in `safetensors_head`.
"""

from __future__ import annotations

import io
import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from kvmem.cache import KVCacheItem, ModelFingerprint, dynamic_cache
from kvmem.errors import DamagedFileError, StorageError
from kvmem.storage import manifest, parallel_read, safetensors_header
from kvmem.storage.atomic_write import HashingWriter, replacing, write_all
from kvmem.storage.base import Storage
from kvmem.storage.checksums import RegionHash
from kvmem.storage.safetensors_header import DTYPES, Head


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
        head = safetensors_header.write(path, items)
        regions = RegionHash()
        with replacing(path) as file:
            write_all(file, memoryview(head))
            with HashingWriter(file, regions) as writer:
                for item in items:
                    for tensor in manifest.tensors_of(item):
                        writer.write(manifest.tight_cpu(tensor).reshape(-1).view(torch.uint8).numpy())
            file.seek(0)
            write_all(file, memoryview(safetensors_header.sealed(head, regions.digests())))

    def load(
        self, path: Path, fingerprint: ModelFingerprint, config: PreTrainedConfig, device: torch.device
    ) -> list[KVCacheItem]:
        with _opened(path) as file:
            head = safetensors_header.read(file, path)
            mapping = _map(file) if head.regions is None or device.type == "cpu" else None
            if mapping is not None and head.regions is None:
                safetensors_header.check_whole(memoryview(mapping), path)
            contents = manifest.read(head.manifest, path)
            manifest.check_model(contents, fingerprint, path)
            if mapping is not None:
                tensors = _mapped(mapping, head, device, path)
            else:
                tensors = read_staged(file, head, [entry.layers for entry in contents.items], device, path)
        items = []
        for i, entry in enumerate(contents.items):
            layers = [(tensors[f"{i}.{layer}.k"], tensors[f"{i}.{layer}.v"]) for layer in range(entry.layers)]
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
        head = safetensors_header.read(file, path)
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


def _mapped(mapping: mmap.mmap, head: Head, device: torch.device, path: Path) -> dict[str, torch.Tensor]:
    """All tensors, verified: views of the mapping on the CPU, else copies on `device`."""
    if head.regions is not None:
        head.regions.check_all(memoryview(mapping)[head.body_at :], path)
    return {
        name: torch.frombuffer(
            mapping,
            dtype=DTYPES[entry["dtype"]],
            count=math.prod(entry["shape"]),
            offset=head.body_at + entry["data_offsets"][0],
        )
        .view(entry["shape"])
        .to(device)
        for name, entry in head.tensors.items()
    }


def read_staged(
    file: io.FileIO, head: Head, layers: Sequence[int], device: torch.device, path: Path
) -> dict[str, torch.Tensor]:
    """All tensors, verified: views of one allocation on `device` for each item, which has so many layers."""
    assert head.regions is not None
    spans = [head.span(i, count) for i, count in enumerate(layers)]
    parts = parallel_read.read(file, head.body_at, head.regions, spans, device, path)
    tensors, entries = {}, head.tensors
    for i, (part_N, (at, _)) in enumerate(zip(parts, spans, strict=True)):
        for name in head.names(i, layers[i]):
            entry = entries[name]
            start, end = entry["data_offsets"]
            dtype, raw_N = DTYPES[entry["dtype"]], part_N[start - at : end - at]
            if raw_N.storage_offset() % dtype.itemsize:  # behind an odd number of narrower elements
                raw_N = raw_N.clone()
            tensors[name] = raw_N.view(dtype).view(entry["shape"])
    return tensors
