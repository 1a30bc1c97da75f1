"""MemOS's pickled dictionary: its objects as they are written, and its two vintages as they are read."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import DynamicCache

from kvmem.cache import KV, KVCacheItem, KVCacheMetadata, MemoryTokens, TextualSource, dynamic_cache
from kvmem.errors import DamagedFileError
from kvmem.storage import safe_unpickler
from kvmem.storage.atomic_write import HashingWriter
from kvmem.storage.manifest import tight_cpu

ITEMS_KEY = "kv_cache_memories"
MANIFEST_KEY = "kvmem_manifest"
PROTOCOL = 4


class _Published:
    """An object that is written as an instance of a pydantic class of MemOS's, which need not be installed."""

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
    """pickle writes a reduction by a function of this name as "make an empty object of the class"."""


class _Item(_Published):
    global_name = ("memos.memories.activation.item", "KVCacheItem")


class _Records(_Published):
    global_name = ("memos.memories.activation.item", "KVCacheRecords")


# The pickler written in Python, because the one in C imports every class that it names to check it.
class _Pickler(pickle._Pickler):
    def save_type(self, obj: type) -> None:
        if issubclass(obj, _Published):
            self.write(  # type: ignore[attr-defined]
                pickle.GLOBAL + "{}\n{}\n".format(*obj.global_name).encode()
            )
        else:
            super().save_type(obj)  # type: ignore[misc]

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        tensor = tight_cpu(obj)
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # torch writes the whole storage, tokens that were cut off included
        return tensor.__reduce_ex__(PROTOCOL)

    dispatch: ClassVar = {**pickle._Pickler.dispatch, type: save_type}  # type: ignore[dict-item]


def write(file: HashingWriter, items: Sequence[KVCacheItem], manifest_json: str) -> None:
    """The dictionary as MemOS's own `dump` writes it, and the manifest as one more key, which its `load` ignores."""
    contents = {
        ITEMS_KEY: {
            item.kv_cache_id: _Item(
                id=item.kv_cache_id,
                memory=item.kv_cache,
                metadata={
                    "source_text": item.metadata.source_text,
                    "extracted_at": item.metadata.extracted_at.isoformat(),
                },
                records=_Records(
                    text_memories=[item.metadata.source_text],
                    composed_text_memory=item.metadata.source_text,
                    timestamp=item.metadata.extracted_at,
                ),
            )
            for item in items
        },
        MANIFEST_KEY: manifest_json,
    }
    pickler = _Pickler(file, PROTOCOL)
    pickler.fast = True  # no memo: it would hold the bytes of every tensor to the end, here and when they are read
    pickler.dump(contents)


def items_of(contents: Any, path: Path) -> list[dict[str, Any]]:
    """The fields of each item: of a dictionary by id, a list, or either of them under `kv_cache_memories`."""
    found = contents.get(ITEMS_KEY, contents) if isinstance(contents, dict) else contents
    entries = list(found.values()) if isinstance(found, dict) else found
    if not isinstance(entries, list):
        raise DamagedFileError(f"{path} holds a {type(contents).__name__} and no memories: another program's file?")
    fields = [entry.fields if isinstance(entry, safe_unpickler.Item) else entry for entry in entries]
    if not all(isinstance(entry, dict) for entry in fields):
        raise DamagedFileError(f"{path} holds things that are no KV cache items: another program's file?")
    return fields


def layers_of(fields: dict[str, Any], path: Path) -> list[KV]:
    """The (keys, values) of an item's cache, whichever transformers wrote it."""
    cache = fields.get("memory", fields.get("kv_cache"))
    parts = cache.fields if isinstance(cache, safe_unpickler.Cache) else {}
    if "layers" in parts:
        layers = [layer.fields for layer in _list(parts["layers"]) if isinstance(layer, safe_unpickler.Layer)]
        pairs: list[KV] = [(layer.get("keys"), layer.get("values")) for layer in layers]  # type: ignore[misc]
    else:
        pairs = list(zip(_list(parts.get("key_cache")), _list(parts.get("value_cache")), strict=False))
    if not pairs or not all(isinstance(tensor, torch.Tensor) for pair in pairs for tensor in pair):
        raise DamagedFileError(f"{path}: an item holds no keys and values: an empty cache? Extract it again.")
    return pairs


def unverified_item(fields: dict[str, Any], cache: DynamicCache, path: Path) -> KVCacheItem:
    """An item that its file tells little of: no fingerprint, no token ids; the source text where it is told."""
    metadata = fields.get("metadata")
    told = metadata if isinstance(metadata, dict) else {}
    records = fields.get("records")
    composed = records.fields.get("composed_text_memory") if isinstance(records, safe_unpickler.ItemRecords) else None
    source = told.get("source_text") or composed or ""
    kv_cache_id = str(fields.get("id", fields.get("kv_cache_id")))
    carried = {k: v for k, v in told.items() if k not in ("source_text", "extracted_at") and _is_plain(v)}
    return KVCacheItem(
        kv_cache=cache,
        kv_cache_id=kv_cache_id,
        metadata=KVCacheMetadata(
            tokens=MemoryTokens(source=str(source), template="unknown", token_ids=(), header_tokens=0, body_end=0),
            extracted_at=_time(told.get("extracted_at"), path),
            build_s=0.0,  # not told
            kv_bytes=dynamic_cache.nbytes(cache),
            fingerprint=None,
            textual_memory=TextualSource(id=kv_cache_id, metadata=carried) if carried else None,
        ),
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(entry) for key, entry in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def _time(text: Any, path: Path) -> datetime:
    """When an item was extracted: as it says, else when its file was written."""
    if isinstance(text, str):
        try:
            return datetime.fromisoformat(text)
        except ValueError:
            pass
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)
