"""The default format: a safetensors file with a manifest and a checksum, mapped and not read.

Any safetensors reader can open it: tensors `<item>.<layer>.k` and `.v`, (1, kv_heads, tokens, head_dim). The header's
metadata holds the checksum and the manifest. The checksum is XXH3-128 of the whole file, with the digits of the
checksum itself as zeros: a flipped bit anywhere is refused. It guards against accidents, not against a forger.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import PreTrainedConfig

from kvmem import dynamic_cache
from kvmem.errors import DamagedFileError, StorageError
from kvmem.fingerprint import ModelFingerprint
from kvmem.items import KVCacheItem
from kvmem.storage import Storage, manifest
from kvmem.storage.atomic import replacing, write_all
from kvmem.storage.hashing import HashingWriter

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

ALIGN_BYTES = 64
LENGTH_BYTES = 8
NO_CHECKSUM = b"0" * 32
HEADER_START = b'{"__metadata__":{"checksum":"'
CHECKSUM_AT = LENGTH_BYTES + len(HEADER_START)
TENSORS_AT_LEAST = CHECKSUM_AT + len(NO_CHECKSUM)


class SafetensorsFile(Storage):
    """Dump streams the tensors from where they are; load maps the file, so its pages are the tensors.

    A loaded tensor stays right when the file is dumped again or deleted, because a dump never writes into a file that
    is in use: it puts a new one in its place. Writing into a loaded tensor changes neither the file nor other readers.
    """

    name = "safetensors"
    suffixes = (".safetensors",)

    def dump(self, path: Path, items: Sequence[KVCacheItem]) -> None:
        # Written here and not by safetensors' own writer, which wants every tensor contiguous and on the CPU before it
        # starts, and leaves no place to hash the bytes on their way.
        head = _head(path, items)
        with replacing(path) as file:
            with HashingWriter(file) as writer:
                writer.write(head)
                for item in items:
                    for tensor in manifest.tensors_of(item):
                        writer.write(manifest.tight_cpu(tensor).reshape(-1).view(torch.uint8).numpy())
            file.seek(CHECKSUM_AT)
            write_all(file, memoryview(writer.digest.hexdigest().encode()))

    def load(
        self, path: Path, fingerprint: ModelFingerprint, config: PreTrainedConfig, device: torch.device
    ) -> list[KVCacheItem]:
        mapping = _map(path)
        header, tensors_at = _verified_header(path, mapping)
        contents = manifest.read(header["__metadata__"]["manifest"], path)
        manifest.check_model(contents, fingerprint, path)
        items = []
        for i, entry in enumerate(contents.items):
            layers = [
                (_tensor(mapping, header[f"{i}.{layer}.k"], tensors_at, device),
                 _tensor(mapping, header[f"{i}.{layer}.v"], tensors_at, device))
                for layer in range(entry.layers)
            ]  # fmt: skip
            if entry.metadata.fingerprint is None:
                manifest.check_shape(entry.kv_cache_id, layers, fingerprint, path)
            cache = dynamic_cache.from_layers(layers, config, entry.cache_tokens)
            items.append(KVCacheItem(cache, entry.metadata, entry.kv_cache_id))
        return items


def read_token_ids(path: Path) -> tuple[int, ...]:
    """The token ids of a file's first item, from its header alone: quick, and not vouched for by the checksum.

    Raises StorageError for a file that can't be read, or whose header is damaged.
    """
    mapping = _map(path)
    if mapping[LENGTH_BYTES:CHECKSUM_AT] != HEADER_START:
        raise DamagedFileError(f"{path} does not start like a memory of kvmem: another kind of file, or damaged.")
    end = LENGTH_BYTES + int.from_bytes(mapping[:LENGTH_BYTES], "little")
    try:
        text = json.loads(mapping[LENGTH_BYTES:end])["__metadata__"]["manifest"]
    except (ValueError, KeyError) as error:
        raise DamagedFileError(f"{path} has a damaged header ({error}). Take another copy of the file.") from error
    items = manifest.read(text, path).items
    if not items:
        raise DamagedFileError(f"{path} holds no item. Dump a memory there first.")
    return items[0].metadata.tokens.token_ids


def _head(path: Path, items: Sequence[KVCacheItem]) -> bytes:
    """Everything before the tensors: 8 bytes of length and the JSON header, with the checksum as zeros."""
    fields: dict[str, Any] = {"__metadata__": {"checksum": NO_CHECKSUM.decode(), "manifest": manifest.of_items(items)}}
    end = 0
    for i, item in enumerate(items):
        for layer, pair in enumerate(dynamic_cache.layers_of(item.kv_cache)):
            for kind, tensor in zip("kv", pair, strict=True):
                if tensor.dtype not in DTYPE_NAMES:
                    raise StorageError(
                        f"{path}: item {item.kv_cache_id} is of dtype {tensor.dtype}. Known: {', '.join(DTYPES)}."
                    )
                start, end = end, end + tensor.numel() * tensor.element_size()
                fields[f"{i}.{layer}.{kind}"] = {
                    "dtype": DTYPE_NAMES[tensor.dtype],
                    "shape": list(tensor.shape),
                    "data_offsets": [start, end],
                }
    header = json.dumps(fields, separators=(",", ":")).encode()
    header += b" " * (-(LENGTH_BYTES + len(header)) % ALIGN_BYTES)
    assert header.startswith(HEADER_START + NO_CHECKSUM)
    return len(header).to_bytes(LENGTH_BYTES, "little") + header


def _map(path: Path) -> mmap.mmap:
    """The whole file, copy-on-write. It stays open as long as a tensor is on it."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size < TENSORS_AT_LEAST:
                raise DamagedFileError(f"{path} is too short for a memory: empty or cut off. Take another copy of it.")
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise StorageError(f"{path} can't be read ({error}). Dump a memory there, or give another folder.") from error
    mapping.madvise(mmap.MADV_WILLNEED)
    return mapping


def _verified_header(path: Path, mapping: mmap.mmap) -> tuple[dict[str, Any], int]:
    """The header and where the tensors start, once the checksum has vouched for every byte (and touched every page)."""
    if mapping[LENGTH_BYTES:CHECKSUM_AT] != HEADER_START:
        raise DamagedFileError(f"{path} does not start like a memory of kvmem: another kind of file, or damaged.")
    file = memoryview(mapping)
    digest = xxhash.xxh3_128(file[:CHECKSUM_AT])
    digest.update(NO_CHECKSUM)
    digest.update(file[TENSORS_AT_LEAST:])
    if mapping[CHECKSUM_AT:TENSORS_AT_LEAST] != digest.hexdigest().encode():
        raise DamagedFileError(f"{path} is damaged: its checksum does not fit its content. Take another copy of it.")
    tensors_at = LENGTH_BYTES + int.from_bytes(mapping[:LENGTH_BYTES], "little")
    return json.loads(mapping[LENGTH_BYTES:tensors_at]), tensors_at


def _tensor(mapping: mmap.mmap, entry: dict[str, Any], tensors_at: int, device: torch.device) -> torch.Tensor:
    """One tensor: a view of the mapping on the CPU, else a copy on `device`."""
    count = math.prod(entry["shape"])
    at = tensors_at + entry["data_offsets"][0]
    flat = torch.frombuffer(mapping, dtype=DTYPES[entry["dtype"]], count=count, offset=at)
    return flat.view(entry["shape"]).to(device)
