"""What a file states about itself: its format version, and for each item everything but the tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pydantic
import torch
from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticSerializationError

from kvmem.cache import KV, KVCacheItem, KVCacheMetadata, ModelFingerprint, dynamic_cache, value_fault
from kvmem.errors import DamagedFileError, FingerprintError, StorageError

FORMAT_VERSION = 1


class ItemManifest(BaseModel):
    """One item. `cache_tokens`: how many tokens the cache stands for; sliding layers hold fewer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kv_cache_id: str
    cache_tokens: int
    layers: int
    metadata: KVCacheMetadata


class Manifest(BaseModel):
    """All items of one file, in the order in which they were added."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = FORMAT_VERSION
    items: tuple[ItemManifest, ...]


def to_json(items: Sequence[KVCacheItem]) -> str:
    """The manifest of `items` as JSON. Raises StorageError for metadata that JSON would not give back as it is."""
    for item in items:
        source = item.metadata.textual_memory
        fault = value_fault(source.metadata) if source is not None else ""
        if fault:
            raise StorageError(
                f"Item {item.kv_cache_id} can't be written: metadata{fault}. Use plain JSON values in the metadata of "
                "its text memory."
            )
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
        raise StorageError(f"An item's metadata is not JSON ({error}). Use plain values in it.") from error


def from_json(text: str, path: Path) -> Manifest:
    """Parses a manifest that a checksum has verified. Raises StorageError for another format version."""
    version = json.loads(text).get("version")
    if version != FORMAT_VERSION:
        raise StorageError(
            f"{path} is of format version {version}, and this kvmem reads version {FORMAT_VERSION}. Upgrade kvmem."
        )
    try:
        return Manifest.model_validate_json(text)
    except pydantic.ValidationError as error:
        raise DamagedFileError(
            f"{path} has a manifest that its version does not allow ({error}). Dump it again."
        ) from error


def check_model(manifest: Manifest, fingerprint: ModelFingerprint, path: Path) -> None:
    """Raises FingerprintError if an item was built by another model. Skips unverified items, see `check_shape`."""
    for item in manifest.items:
        built_by = item.metadata.fingerprint
        difference = built_by and fingerprint.difference(built_by)
        if difference:
            raise FingerprintError(
                f"{path}: item {item.kv_cache_id} was built by another model: {difference}. "
                "Load it with that model, or extract it again with this one."
            )


def check_shape(kv_cache_id: str, layers: Sequence[KV], fingerprint: ModelFingerprint, path: Path) -> None:
    """Raises FingerprintError if layers, heads, head size or dtype of the tensors are not those of the model."""
    difference = fingerprint.shape_difference(layers)
    if difference:
        raise FingerprintError(
            f"{path}: item {kv_cache_id} can't be from this model: {difference}. "
            "Load it with the model that built it, or extract it again."
        )


def contiguous_on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous, in host memory; not copied if it already is."""
    return tensor.detach().cpu().contiguous()


def tensors_of(item: KVCacheItem) -> list[torch.Tensor]:
    """Keys and values, layer by layer, not copied."""
    return [tensor for pair in dynamic_cache.layers_of(item.kv_cache) for tensor in pair]
