"""What a file states about itself: its format version, and for each item everything but the tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pydantic
import torch
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticSerializationError
from transformers import PreTrainedConfig

from kvmem.cache import (
    BIAS,
    KEYS,
    PACKED_KEYS,
    PACKED_VALUES,
    VALUES,
    CacheLayout,
    Compaction,
    KVCacheItem,
    KVCacheMetadata,
    ModelFingerprint,
    TensorLayout,
    dynamic_cache,
    value_fault,
)
from kvmem.errors import DamagedFileError, FingerprintError, StorageError

KEYS_AND_VALUES_ONLY = 1
"""The version of a file whose layers all keep keys and values. Every version of kvmem reads it."""
FORMAT_VERSION = 2
"""The version of a file with a layer that keeps something else, such as a state: its manifest names it."""
COMPACTED_VERSION = 3
"""The version of a file with a compacted memory, whose layers keep fewer entries than it has tokens."""
VERSIONS = (KEYS_AND_VALUES_ONLY, FORMAT_VERSION, COMPACTED_VERSION)

KEYS_AND_VALUES = (KEYS, VALUES)


class ItemManifest(BaseModel):
    """One item. `cache_tokens`: how many tokens the cache stands for; sliding layers hold fewer.

    kept: the names of each layer's tensors, if any layer keeps anything but keys and values; else empty.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kv_cache_id: str
    cache_tokens: int = Field(ge=0)
    layers: int = Field(ge=0)
    metadata: KVCacheMetadata
    kept: tuple[tuple[str, ...], ...] = Field(default=(), exclude_if=lambda kept: not kept)

    @property
    def tensor_count(self) -> int:
        """How many tensors the item has. Compare it before `names` is used: a damaged file may state any number."""
        return sum(map(len, self.kept)) if self.kept else len(KEYS_AND_VALUES) * self.layers

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """The names of each layer's tensors, in the order of their bytes."""
        return self.kept or (KEYS_AND_VALUES,) * self.layers


class Manifest(BaseModel):
    """All items of one file, in the order in which they were added."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
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
    entries = tuple(map(_entry_of, items))
    version = max(map(_version_of, entries), default=KEYS_AND_VALUES_ONLY)
    try:
        return Manifest(version=version, items=entries).model_dump_json()
    except PydanticSerializationError as error:
        raise StorageError(f"An item's metadata is not JSON ({error}). Use plain values in it.") from error


def _version_of(entry: ItemManifest) -> int:
    """The lowest version that can state the item."""
    if entry.metadata.compaction is not None:
        return COMPACTED_VERSION
    return FORMAT_VERSION if entry.kept else KEYS_AND_VALUES_ONLY


def _entry_of(item: KVCacheItem) -> ItemManifest:
    names = tuple(tuple(kept) for kept in dynamic_cache.contents_of(item.kv_cache))
    return ItemManifest(
        kv_cache_id=item.kv_cache_id,
        cache_tokens=item.kv_cache.get_seq_length(),
        layers=len(names),
        metadata=item.metadata,
        kept=unless_usual(names),
    )


def unless_usual(names: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
    """The names, or nothing if every layer keeps keys and values."""
    return names if any(layer != KEYS_AND_VALUES for layer in names) else ()


def from_json(text: str, path: Path) -> Manifest:
    """Parses a manifest. Raises StorageError for another format version, and DamagedFileError if it is none."""
    try:
        stated = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad_manifest(path, error) from None
    version = stated.get("version") if isinstance(stated, dict) else None
    if version is None:
        raise _bad_manifest(path, "it states no version")
    if version not in VERSIONS:
        raise StorageError(
            f"{path} is of format version {version}, and this kvmem reads up to version {VERSIONS[-1]}. Upgrade kvmem."
        )
    try:
        manifest = Manifest.model_validate_json(text)
    except pydantic.ValidationError as error:
        raise _bad_manifest(path, error) from error
    for item in manifest.items:
        if item.kept and (version == KEYS_AND_VALUES_ONLY or len(item.kept) != item.layers):
            raise _bad_manifest(path, f"{len(item.kept)} layers with names, of {item.layers}")
        if item.metadata.compaction is not None and (
            version < COMPACTED_VERSION or item.metadata.fingerprint is None or not item.kept
        ):
            raise _bad_manifest(path, f"a compacted item {item.kv_cache_id}")
    return manifest


def _bad_manifest(path: Path, reason: object) -> DamagedFileError:
    return DamagedFileError(f"{path} has a manifest that its version does not allow ({reason}). Dump it again.")


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


def check_shape(
    kv_cache_id: str, contents: Sequence[Mapping[str, torch.Tensor]], fingerprint: ModelFingerprint, path: Path
) -> None:
    """Raises FingerprintError if layers, heads, head size or dtype of the tensors are not those of the model."""
    difference = fingerprint.shape_difference(contents)
    if difference:
        raise FingerprintError(
            f"{path}: item {kv_cache_id} can't be from this model: {difference}. "
            "Load it with the model that built it, or extract it again."
        )


def check_unverified(
    item: ItemManifest,
    contents: Sequence[Mapping[str, torch.Tensor]],
    model: ModelFingerprint,
    config: PreTrainedConfig,
    path: Path,
) -> None:
    """As `check_shape` and `check_tensors`, for an item that does not say which model built it."""
    check_shape(item.kv_cache_id, contents, model, path)
    check_tensors(item, layouts_of(contents), model, config, path)


def layouts_of(contents: Sequence[Mapping[str, torch.Tensor]]) -> list[TensorLayout]:
    """Of all tensors, layer by layer."""
    return [(tensor.dtype, tuple(tensor.shape)) for kept in contents for tensor in kept.values()]


def check_tensors(
    item: ItemManifest, layouts: Sequence[TensorLayout], model: ModelFingerprint, config: PreTrainedConfig, path: Path
) -> None:
    """Raises DamagedFileError if the tensors of an item are not those that its manifest and its model state, and
    StorageError if it has none, as a prefix on a server.

    layouts: of what each layer keeps, layer by layer. An item may hold a share of the heads: what one rank wrote.
    Sliding layers may hold fewer tokens than the item stands for.
    """
    tokens, known = item.cache_tokens, item.metadata.tokens
    layers = dynamic_cache.layer_count(config)
    if layers and not item.layers and not layouts:
        raise StorageError(
            f"{path}: item {item.kv_cache_id} is a prefix on a server and has no tensors. Extract it again."
        )
    if len(layouts) != item.tensor_count or item.layers != layers:
        raise _lies(item, f"{len(layouts)} tensors for {item.layers} layers, of {layers} of the model", path)
    if known.token_ids and item.layers and len(known.token_ids) != tokens:
        raise _lies(item, f"{len(known.token_ids)} token ids for {tokens} tokens", path)
    if not 0 <= known.header_tokens <= known.body_end <= len(known.token_ids):
        raise _lies(item, f"a body from token {known.header_tokens} to {known.body_end}", path)
    if known_compaction := item.metadata.compaction:
        return _check_compacted(item, known_compaction, layouts, model, path)
    slides, equal = dynamic_cache.has_sliding_layers(config), dynamic_cache.has_equal_layers(config)
    if model.layout is not None:
        return _check_measured(item, layouts, model.layout, slides, path)
    if item.kept:
        raise _lies(item, "layers that keep more than keys and values", path)
    for dtype, shape in layouts:
        if str(dtype) != f"torch.{model.dtype}":
            raise _lies(item, f"a tensor of {dtype}, of a model of {model.dtype}", path)
        batch, heads, length, head_dim = shape if len(shape) == 4 else (0, 0, 0, 0)
        fits_tokens = length == tokens or (slides and 0 < length < tokens)
        fits_heads = heads > 0 and (not equal or (model.kv_heads % heads == 0 and head_dim == model.head_dim))
        if batch != 1 or not fits_tokens or not fits_heads:
            expected = f"(1, {model.kv_heads}, {tokens}, {model.head_dim})"
            raise _lies(item, f"a tensor of shape {shape}, for {expected}", path)


def _check_measured(
    item: ItemManifest, layouts: Sequence[TensorLayout], expected: CacheLayout, slides: bool, path: Path
) -> None:
    """Raises DamagedFileError unless names, shapes and dtypes are those that were measured on the model."""
    if item.names != expected.names:
        raise _lies(item, f"tensors named {item.names}, for {expected.names}", path)
    kept = [tensor for layer in expected.layers for tensor in layer]
    for tensor, layout in zip(kept, layouts, strict=True):
        tokens = item.cache_tokens
        if slides and tensor.is_entry and len(layout[1]) > 1:
            tokens = min(max(layout[1][-2], 1), tokens)
        if layout != tensor.at(tokens):
            raise _lies(item, f"{tensor.name} of {layout[0]} and shape {layout[1]}, for {tensor.at(tokens)}", path)


def _check_compacted(
    item: ItemManifest, stated: Compaction, layouts: Sequence[TensorLayout], model: ModelFingerprint, path: Path
) -> None:
    """Raises DamagedFileError unless the tensors are those of so many entries for each layer and head."""
    if len(stated.entries) != model.layers or model.layout is not None:
        raise _lies(item, f"entries of {len(stated.entries)} layers, of {model.layers} of the model", path)
    names = (PACKED_KEYS, PACKED_VALUES, BIAS) if stated.has_bias else (PACKED_KEYS, PACKED_VALUES)
    if item.kept != (names,) * model.layers:
        raise _lies(item, f"tensors named {item.kept}, for {names} in each layer", path)
    dtype, found = getattr(torch, model.dtype), iter(layouts)
    for heads in stated.entries:
        if len(heads) != model.kv_heads or min(heads) < 1:
            raise _lies(item, f"entries of {heads}, for {model.kv_heads} heads", path)
        for name in names:
            expected = dtype, (1, 1, sum(heads), 1 if name == BIAS else model.head_dim)
            if (layout := next(found)) != expected:
                raise _lies(item, f"{name} of {layout[0]} and shape {layout[1]}, for {expected}", path)


def check_size(item: ItemManifest, model: ModelFingerprint, config: PreTrainedConfig, path: Path) -> None:
    """Raises DamagedFileError if a manifest states more bytes of keys and values than its tokens have, or fewer.

    For a manifest without its tensors. Sliding layers hold fewer tokens, and layers that differ are not known here.
    """
    if not dynamic_cache.has_equal_layers(config):
        return
    if done := item.metadata.compaction:
        numbers = 2 * model.head_dim + (1 if done.has_bias else 0)
        whole = sum(map(sum, done.entries)) * numbers * getattr(torch, model.dtype).itemsize
        if item.metadata.kv_bytes != whole:
            raise _lies(item, f"{item.metadata.kv_bytes} bytes for entries of {whole}", path)
        return
    if item.kept != (unless_usual(model.layout.names) if model.layout is not None else ()):
        raise _lies(item, "layers that keep other tensors than the model's", path)
    stated, whole = item.metadata.kv_bytes, model.kv_bytes(item.cache_tokens)
    full = not dynamic_cache.has_sliding_layers(config) and dynamic_cache.layer_count(config) == model.layers
    if stated > whole or (full and stated < whole):
        raise _lies(item, f"{stated} bytes for {item.cache_tokens} tokens, which have {whole}", path)


def _lies(item: ItemManifest, what: str, path: Path) -> DamagedFileError:
    return DamagedFileError(
        f"{path}: item {item.kv_cache_id} is not what its manifest says: {what}. Take another copy of the file."
    )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. One pass: 0.2 ms for each MB of fp32 on one CPU core."""
    if not tensor.numel():
        return True
    low, high = (tensor if tensor.dtype.itemsize > 1 else tensor.float()).detach().aminmax()
    return bool(low.isfinite() & high.isfinite())


def check_finite(item: KVCacheItem, path: Path, error: type[StorageError] = StorageError) -> None:
    """Raises `error` if a key, value or state is NaN or infinite: every answer from it would be noise."""
    for layer, kept in enumerate(dynamic_cache.contents_of(item.kv_cache)):
        if not all(map(is_finite, kept.values())):
            raise error(
                f"{path}: item {item.kv_cache_id} holds NaN or infinite values in layer {layer}, as a model computes "
                "that overflows. Extract it again, in float32 or bfloat16."
            )


def contiguous_on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous, in host memory; not copied if it already is."""
    return tensor.detach().cpu().contiguous()


def tensors_of(item: KVCacheItem) -> list[torch.Tensor]:
    """What each layer keeps, layer by layer, not copied."""
    return [tensor for kept in dynamic_cache.contents_of(item.kv_cache) for tensor in kept.values()]
