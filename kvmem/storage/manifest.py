"""What a file says of itself: its format version, and for each item everything but the tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pydantic
import torch
from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticSerializationError

from kvmem.cache import KV, KVCacheItem, KVCacheMetadata, ModelFingerprint, dynamic_cache
from kvmem.errors import DamagedFileError, FingerprintError, StorageError

FORMAT_VERSION = 1


class ItemManifest(BaseModel):
    """One item. `cache_tokens` is the length of the text behind the cache; sliding layers hold fewer tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kv_cache_id: str
    cache_tokens: int
    layers: int
    metadata: KVCacheMetadata


class Manifest(BaseModel):
    """All items of one file, in the order of adding."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = FORMAT_VERSION
    items: tuple[ItemManifest, ...]


def of_items(items: Sequence[KVCacheItem]) -> str:
    """The manifest of `items`, as JSON. Raises StorageError for metadata that JSON can't hold."""
    entries = tuple(
        ItemManifest(
            kv_cache_id=item.kv_cache_id,
            cache_tokens=item.kv_cache.get_seq_length(),
            layers=len(item.kv_cache.layers),
            metadata=item.metadata,
        )
        for item in items
    )
    try:
        return Manifest(items=entries).model_dump_json()
    except PydanticSerializationError as error:
        raise StorageError(f"An item's metadata is no JSON ({error}). Keep plain values in it.") from error


def read(text: str, path: Path) -> Manifest:
    """The manifest in `text`, which a checksum has vouched for. Raises StorageError for another format version."""
    version = json.loads(text).get("version")
    if version != FORMAT_VERSION:
        raise StorageError(
            f"{path} is of format version {version}, and this kvmem reads version {FORMAT_VERSION}. Upgrade kvmem."
        )
    try:
        return Manifest.model_validate_json(text)
    except pydantic.ValidationError as error:
        raise DamagedFileError(f"{path} has a manifest unlike its version's ({error}). Dump it again.") from error


def check_model(manifest: Manifest, fingerprint: ModelFingerprint, path: Path) -> None:
    """Raises FingerprintError if an item was built by another model; an unverified one is left to `check_shape`."""
    for item in manifest.items:
        theirs = item.metadata.fingerprint
        difference = theirs and fingerprint.difference(theirs)
        if difference:
            raise FingerprintError(
                f"{path}: item {item.kv_cache_id} was built by another model: {difference}. "
                "Load it with that model, or extract it again with this one."
            )


def check_shape(kv_cache_id: str, layers: Sequence[KV], fingerprint: ModelFingerprint, path: Path) -> None:
    """Raises FingerprintError if tensors of unknown origin can't be of this model: layers, heads, head size, dtype."""
    difference = fingerprint.shape_difference(layers)
    if difference:
        raise FingerprintError(
            f"{path}: item {kv_cache_id} can't be of this model: {difference}. "
            "Load it with the model that built it, or extract it again."
        )


def tight_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in RAM, contiguous; itself, not a copy, where it already is."""
    return tensor.detach().cpu().contiguous()


def tensors_of(item: KVCacheItem) -> list[torch.Tensor]:
    """Keys and values of each layer in turn, not copied."""
    return [tensor for pair in dynamic_cache.layers_of(item.kv_cache) for tensor in pair]
