"""MemOS's format: a pickled dictionary that MemOS can read, and that is read here without running code in it.

The dictionary is `{"kv_cache_memories": {id: KVCacheItem}}`, as MemOS's own `dump` writes it, with the manifest under
one more key, which MemOS ignores. Two generations of MemOS's items are read: the current one has `id` and `memory`, the
older one `kv_cache_id` and `kv_cache`. Behind the end of the pickle, where no unpickler looks, is a seal: the XXH3-128
of everything before it.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
import xxhash
from transformers import PreTrainedConfig

from kvmem.cache import (
    CONV,
    INDEXER,
    KEYS,
    RECURRENT,
    VALUES,
    Contents,
    KVCacheItem,
    KVCacheMetadata,
    MemoryTokens,
    ModelFingerprint,
    TextualSource,
    dynamic_cache,
    text_fault,
    value_fault,
)
from kvmem.errors import DamagedFileError, StorageError
from kvmem.storage import manifest, safe_unpickler
from kvmem.storage.atomic_write import CHUNK_BYTES, HashingWriter, replacing, write_all
from kvmem.storage.base import Storage, opened
from kvmem.storage.manifest import ItemManifest

SEAL = b"kvmem xxh3_128: "
SEAL_BYTES = len(SEAL) + xxhash.xxh3_128().digest_size
ITEMS_KEY = "kv_cache_memories"
MANIFEST_KEY = "kvmem_manifest"
PROTOCOL = 4
MOST_VALUES = 100_000
"""How many values an entry of another program's metadata may have; a larger one is left out."""


class PickleFile(Storage):
    """A pickle with a seal behind its end.

    A file without seal and manifest comes from another program: its items load as unverified (fingerprint None) if
    their shape and dtype are those of the model. Prefer `.safetensors`, which loads without a copy, unless MemOS has to
    read the file.
    """

    name = "pickle"
    suffixes = (".pickle", ".pkl")

    def dump(self, path: Path, items: Sequence[KVCacheItem]) -> None:
        without_tensors = [item.kv_cache_id for item in items if not item.kv_cache.layers]
        if without_tensors:
            raise StorageError(
                f"{path}: item {without_tensors[0]} is a prefix on a server and has no tensors, which this format "
                "needs. Use a memory_filename that ends in .safetensors."
            )
        for item in items:
            if item.metadata.compaction is not None:
                raise StorageError(
                    f"{path}: item {item.kv_cache_id} is {item.metadata.lossy}, and this format needs an entry for "
                    "each token. Use a memory_filename that ends in .safetensors."
                )
            manifest.check_finite(item, path)
        manifest_json = manifest.to_json(items)
        digest = xxhash.xxh3_128()
        with replacing(path) as file:
            with HashingWriter(file, digest) as writer:
                _write(writer, items, manifest_json)
            write_all(file, memoryview(SEAL + digest.digest()))

    def load(
        self, path: Path, fingerprint: ModelFingerprint, config: PreTrainedConfig, device: torch.device
    ) -> list[KVCacheItem]:
        with opened(path) as unbuffered, io.BufferedReader(unbuffered) as file:
            sealed = _check_seal(file, path)
            contents = safe_unpickler.load(file, path)
        entries = _entries(contents, path)
        if isinstance(contents, dict) and MANIFEST_KEY in contents:
            if not sealed:
                raise DamagedFileError(f"{path} is damaged: its seal is gone. Take another copy of the file.")
            if not isinstance(contents[MANIFEST_KEY], str):
                raise DamagedFileError(f"{path} has a manifest that is not text. Take another copy of the file.")
            stated = manifest.from_json(contents[MANIFEST_KEY], path)
            return _verified_items(entries, stated, path, fingerprint, config, device)
        return _unverified_items(entries, path, fingerprint, config, device)


def _check_seal(file: IO[bytes], path: Path) -> bool:
    """Whether the file has a seal. Raises DamagedFileError if the seal does not match the content."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise DamagedFileError(f"{path} is empty. Take another copy of the file.")
    remaining = max(0, size - SEAL_BYTES)
    file.seek(remaining)
    seal = file.read(SEAL_BYTES)
    file.seek(0)
    if not seal.startswith(SEAL):
        return False
    digest = xxhash.xxh3_128()
    while remaining:
        chunk = file.read(min(CHUNK_BYTES, remaining))
        digest.update(chunk)
        remaining -= len(chunk)
    file.seek(0)
    if seal != SEAL + digest.digest():
        raise DamagedFileError(f"{path} is damaged: its checksum does not fit its content. Take another copy of it.")
    return True


def _verified_items(
    entries: list[dict[str, Any]],
    contents: manifest.Manifest,
    path: Path,
    fingerprint: ModelFingerprint,
    config: PreTrainedConfig,
    device: torch.device,
) -> list[KVCacheItem]:
    manifest.check_model(contents, fingerprint, path)
    if len(entries) != len(contents.items):
        raise DamagedFileError(
            f"{path} holds {len(entries)} items, and its manifest states {len(contents.items)}. Take another copy."
        )
    items = []
    for fields, entry in zip(entries, contents.items, strict=True):
        layers = _layers(fields, path)
        if entry.metadata.fingerprint is None:
            manifest.check_unverified(entry, layers, fingerprint, config, path)
        else:
            manifest.check_tensors(entry, manifest.layouts_of(layers), fingerprint, config, path)
        items.append(_item(layers, entry.metadata, entry.kv_cache_id, entry.cache_tokens, config, device, path))
    return items


def _item(
    layers: list[Contents],
    metadata: KVCacheMetadata,
    kv_cache_id: str,
    tokens: int,
    config: PreTrainedConfig,
    device: torch.device,
    path: Path,
) -> KVCacheItem:
    on_device = [{name: tensor.to(device) for name, tensor in kept.items()} for kept in layers]
    item = KVCacheItem(dynamic_cache.from_contents(on_device, config, tokens), metadata, kv_cache_id)
    manifest.check_finite(item, path, DamagedFileError)
    return item


def _unverified_items(
    entries: list[dict[str, Any]],
    path: Path,
    fingerprint: ModelFingerprint,
    config: PreTrainedConfig,
    device: torch.device,
) -> list[KVCacheItem]:
    items = []
    for fields in entries:
        layers = _layers(fields, path)
        entry = _unverified_entry(fields, layers, path)
        manifest.check_unverified(entry, layers, fingerprint, config, path)
        items.append(_item(layers, entry.metadata, entry.kv_cache_id, entry.cache_tokens, config, device, path))
    return items


class _MemOSObject:
    """Is pickled as an instance of a pydantic class of MemOS, which need not be installed."""

    global_name: tuple[str, str]

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def __reduce__(self) -> tuple[Any, ...]:
        state = {
            "__dict__": self.fields,
            "__pydantic_extra__": None,
            "__pydantic_fields_set__": set(self.fields),
            "__pydantic_private__": None,
        }
        return __newobj__, (type(self),), state


def __newobj__(cls: type) -> None:
    """A function of this name in a reduction makes pickle write "create an empty object of the class"."""


class _Item(_MemOSObject):
    global_name = ("memos.memories.activation.item", "KVCacheItem")


class _Records(_MemOSObject):
    global_name = ("memos.memories.activation.item", "KVCacheRecords")


def _save_type(pickler: Any, cls: type) -> None:
    """Writes the class by the name that it has in MemOS."""
    if issubclass(cls, _MemOSObject):
        module, name = cls.global_name
        pickler.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
    else:
        pickle._Pickler.save_type(pickler, cls)  # type: ignore[attr-defined] # typeshed omits this method


# The pickler written in Python, because the one in C imports every class that it names, to check it.
class _Pickler(pickle._Pickler):
    dispatch: ClassVar = {**pickle._Pickler.dispatch, type: _save_type}

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        tensor = manifest.contiguous_on_cpu(obj)
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # torch writes the whole storage, including tokens outside of the view
        return tensor.__reduce_ex__(PROTOCOL)


def _write(file: HashingWriter, items: Sequence[KVCacheItem], manifest_json: str) -> None:
    contents = {
        ITEMS_KEY: {
            _plain_text(item.kv_cache_id): _Item(
                id=_plain_text(item.kv_cache_id),
                memory=item.kv_cache,
                metadata={
                    "source_text": item.metadata.source_text,
                    "extracted_at": item.metadata.extracted_at.isoformat(),
                },
                records=_Records(
                    text_memories=[item.metadata.source_text],
                    composed_text_memory=item.metadata.source_text,
                    timestamp=_plain_time(item.metadata.extracted_at),
                ),
            )
            for item in items
        },
        MANIFEST_KEY: manifest_json,
    }
    pickler = _Pickler(file, PROTOCOL)
    pickler.fast = True  # without a memo, which would keep the bytes of every tensor, when writing and when reading
    pickler.dump(contents)


def _plain_text(text: str) -> str:
    """The same text as a `str`: a pickle names a subclass (numpy's, an enum), and other readers refuse it."""
    return str.__str__(text)


def _plain_time(time: datetime) -> datetime:
    """The same time in UTC, of plain classes: a pickle names the class of a time zone, and other readers refuse it."""
    return datetime.fromisoformat((time if time.tzinfo is None else time.astimezone(UTC)).isoformat())


def _entries(contents: Any, path: Path) -> list[dict[str, Any]]:
    """The fields of each item. `contents` is a dictionary by id, a list, or has one of them as `kv_cache_memories`."""
    items = contents.get(ITEMS_KEY, contents) if isinstance(contents, dict) else contents
    entries = list(items.values()) if isinstance(items, dict) else items
    if not isinstance(entries, list):
        raise DamagedFileError(f"{path} holds a {type(contents).__name__} and no memories: another program's file?")
    fields = [entry.fields if isinstance(entry, safe_unpickler.Item) else entry for entry in entries]
    if not all(isinstance(entry, dict) for entry in fields):
        raise DamagedFileError(f"{path} holds objects that are not KV cache items: another program's file?")
    return fields


def _layers(fields: dict[str, Any], path: Path) -> list[Contents]:
    """What each layer of an item's cache keeps, from any version of transformers."""
    cache = fields.get("memory", fields.get("kv_cache"))
    parts = cache.fields if isinstance(cache, safe_unpickler.Cache) else {}
    if "layers" in parts:
        records = [layer for layer in _list(parts["layers"]) if isinstance(layer, safe_unpickler.Layer)]
    else:
        keys, values = _list(parts.get("key_cache")), _list(parts.get("value_cache"))
        pairs = list(zip(keys, values, strict=True)) if len(keys) == len(values) else []
        records = [safe_unpickler.Layer.with_fields(keys=keys, values=values) for keys, values in pairs]
    layers = [_kept(record.fields) for record in records]
    is_empty = [
        KEYS not in kept and not isinstance(record, safe_unpickler.StateLayer)
        for record, kept in zip(records, layers, strict=True)
    ]
    if not any(layers) or any(is_empty):
        raise DamagedFileError(f"{path}: an item holds no keys and values: an empty cache? Extract it again.")
    return layers


def _kept(fields: dict[str, Any]) -> Contents:
    """What a layer keeps, in the order of `kvmem.cache.layers.contents`."""
    found = {KEYS: fields.get("keys"), VALUES: fields.get("values"), INDEXER: fields.get("indexer_keys")}
    for kind, states in ((CONV, fields.get("conv_states")), (RECURRENT, fields.get("recurrent_states"))):
        if isinstance(states, dict):
            found |= {f"{kind}.{number}": state for number, state in states.items() if type(number) is int}
    tensors = {name: safe_unpickler.tensor_of(value) for name, value in found.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _unverified_entry(fields: dict[str, Any], layers: list[Contents], path: Path) -> ItemManifest:
    """What is known of an item without fingerprint and token ids, with the source text if the file states it."""
    stated = fields.get("metadata")
    metadata = stated if isinstance(stated, dict) else {}
    records = fields.get("records")
    composed = records.fields.get("composed_text_memory") if isinstance(records, safe_unpickler.ItemRecords) else None
    source = next((text for text in (metadata.get("source_text"), composed) if isinstance(text, str) and text), "")
    kv_cache_id = fields.get("id", fields.get("kv_cache_id"))
    if not isinstance(kv_cache_id, str):
        raise DamagedFileError(f"{path}: an item has no id that is text. Extract it again.")
    if fault := text_fault(kv_cache_id) or text_fault(source):
        raise DamagedFileError(f"{path}: the item {kv_cache_id!r} {fault}. Take another copy of the file.")
    carried = {
        k: v
        for k, v in metadata.items()
        if k not in ("source_text", "extracted_at") and _is_small(v) and not value_fault({k: v})
    }
    return ItemManifest(
        kv_cache_id=kv_cache_id,
        cache_tokens=max(kept[KEYS].shape[-2] if KEYS in kept and kept[KEYS].dim() > 1 else 0 for kept in layers),
        layers=len(layers),
        kept=manifest.unless_usual(tuple(tuple(kept) for kept in layers)),
        metadata=KVCacheMetadata(
            tokens=MemoryTokens(source=source, template="unknown", token_ids=(), header_tokens=0, body_end=0),
            extracted_at=_time(metadata.get("extracted_at"), path),
            build_s=0.0,  # unknown
            kv_bytes=sum(tensor.nbytes for kept in layers for tensor in kept.values()),
            fingerprint=None,
            textual_memory=TextualSource(id=kv_cache_id, metadata=carried) if carried else None,
        ),
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_small(value: Any) -> bool:
    """Whether a value has at most `MOST_VALUES` parts. A few bytes of a pickle can be billions, by lists that hold the
    same list many times."""
    remaining, seen = [value], 0
    while remaining:
        part = remaining.pop()
        seen += 1
        inner = list(part.values()) if isinstance(part, dict) else part if isinstance(part, list) else []
        if seen + len(remaining) + len(inner) > MOST_VALUES:
            return False
        remaining += inner
    return True


def _time(text: Any, path: Path) -> datetime:
    """When an item was extracted: `text` if it is a time in ISO format, else the file's modification time."""
    if isinstance(text, str):
        try:
            return datetime.fromisoformat(text)
        except ValueError:
            pass
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except OSError:  # deleted since
        return datetime.now(UTC)
