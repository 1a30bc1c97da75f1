"""The published format: MemOS's pickled dictionary, written so that MemOS can read it and read without running it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
from transformers import PreTrainedConfig

from kvmem.cache import KVCacheItem, ModelFingerprint, dynamic_cache
from kvmem.errors import DamagedFileError, StorageError
from kvmem.storage import manifest, memos_pickle, safe_unpickler
from kvmem.storage.atomic_write import CHUNK_BYTES, HashingWriter, replacing, write_all
from kvmem.storage.base import Storage

SEAL = b"kvmem xxh3_128: "
SEAL_BYTES = len(SEAL) + xxhash.xxh3_128().digest_size


class PickleFile(Storage):
    """A pickle, and behind its end (where no unpickler looks) a seal: XXH3-128 of all that stands before.

    A file without seal and manifest is another program's: its items load as unverified (fingerprint None), if their
    shape and dtype are the model's. Use `.safetensors` where MemOS need not read the file: it loads without a copy.
    """

    name = "pickle"
    suffixes = (".pickle", ".pkl")

    def dump(self, path: Path, items: Sequence[KVCacheItem]) -> None:
        bare = [item.kv_cache_id for item in items if not item.kv_cache.layers]
        if bare:
            raise StorageError(
                f"{path}: item {bare[0]} is a prefix on a server and has no tensors, which are all that this format "
                "holds. Use a memory_filename that ends in .safetensors."
            )
        manifest_json = manifest.of_items(items)
        digest = xxhash.xxh3_128()
        with replacing(path) as file:
            with HashingWriter(file, digest) as writer:
                memos_pickle.write(writer, items, manifest_json)
            write_all(file, memoryview(SEAL + digest.digest()))

    def load(
        self, path: Path, fingerprint: ModelFingerprint, config: PreTrainedConfig, device: torch.device
    ) -> list[KVCacheItem]:
        try:
            with open(path, "rb") as file:
                sealed = _check_seal(file, path)
                contents = safe_unpickler.load(file, path)
        except OSError as error:
            raise StorageError(
                f"{path} can't be read ({error}). Dump a memory there, or give another folder."
            ) from error
        entries = memos_pickle.items_of(contents, path)
        if isinstance(contents, dict) and memos_pickle.MANIFEST_KEY in contents:
            if not sealed:
                raise DamagedFileError(f"{path} is damaged: its seal is gone. Take another copy of the file.")
            told = manifest.read(contents[memos_pickle.MANIFEST_KEY], path)
            return _verified(entries, told, path, fingerprint, config, device)
        return _unverified(entries, path, fingerprint, config, device)


def _check_seal(file: IO[bytes], path: Path) -> bool:
    """True if the file ends in a seal that fits, False if it has none. Raises DamagedFileError if it does not fit."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise DamagedFileError(f"{path} is empty. Take another copy of the file.")
    left = max(0, size - SEAL_BYTES)
    file.seek(left)
    seal = file.read(SEAL_BYTES)
    file.seek(0)
    if not seal.startswith(SEAL):
        return False
    digest = xxhash.xxh3_128()
    while left:
        chunk = file.read(min(CHUNK_BYTES, left))
        digest.update(chunk)
        left -= len(chunk)
    file.seek(0)
    if seal != SEAL + digest.digest():
        raise DamagedFileError(f"{path} is damaged: its checksum does not fit its content. Take another copy of it.")
    return True


def _verified(
    entries: list[dict[str, Any]],
    contents: manifest.Manifest,
    path: Path,
    fingerprint: ModelFingerprint,
    config: PreTrainedConfig,
    device: torch.device,
) -> list[KVCacheItem]:
    manifest.check_model(contents, fingerprint, path)
    items = []
    for fields, entry in zip(entries, contents.items, strict=True):
        layers = memos_pickle.layers_of(fields, path)
        if entry.metadata.fingerprint is None:
            manifest.check_shape(entry.kv_cache_id, layers, fingerprint, path)
        cache = dynamic_cache.from_layers([(k.to(device), v.to(device)) for k, v in layers], config, entry.cache_tokens)
        items.append(KVCacheItem(cache, entry.metadata, entry.kv_cache_id))
    return items


def _unverified(
    entries: list[dict[str, Any]],
    path: Path,
    fingerprint: ModelFingerprint,
    config: PreTrainedConfig,
    device: torch.device,
) -> list[KVCacheItem]:
    items = []
    for fields in entries:
        layers = memos_pickle.layers_of(fields, path)
        manifest.check_shape(str(fields.get("id", fields.get("kv_cache_id"))), layers, fingerprint, path)
        cache = dynamic_cache.from_layers([(k.to(device), v.to(device)) for k, v in layers], config)
        items.append(memos_pickle.unverified_item(fields, cache, path))
    return items
