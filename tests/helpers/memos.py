"""Copies of MemOS's classes, from which its pickles can be made without MemOS."""

from __future__ import annotations

import collections
import datetime
import sys
import types
from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field
from transformers import DynamicCache

from kvmem.cache.dynamic_cache import KV

MODULE = "memos.memories.activation.item"


class KVCacheRecords(BaseModel):
    """Has the fields of MemOS's class of this name."""

    text_memories: list[str] = []
    composed_text_memory: str = ""
    timestamp: datetime.datetime = Field(default_factory=lambda: datetime.datetime.now(datetime.UTC))


class KVCacheItem(BaseModel):
    """Has the fields of MemOS's current class of this name."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    id: str
    memory: Any
    metadata: dict[str, Any] = {}
    records: KVCacheRecords = KVCacheRecords()


class OldItem(BaseModel):
    """Has the fields of MemOS's older KVCacheItem."""

    kv_cache_id: str
    kv_cache: Any
    metadata: dict[str, Any] = {}


OldItem.__qualname__ = "KVCacheItem"  # the name that pickle writes


def old_cache(pairs: Sequence[KV]) -> DynamicCache:
    """A cache in the layout of older versions of transformers."""
    cache = DynamicCache.__new__(DynamicCache)
    cache.__dict__.update(
        _seen_tokens=6,
        key_cache=[keys for keys, _ in pairs],
        value_cache=[values for _, values in pairs],
        _buffers=collections.OrderedDict(),
        training=True,
    )
    return cache


def stand_in(monkeypatch: pytest.MonkeyPatch, item: type[BaseModel] = KVCacheItem) -> types.ModuleType:
    """Installs a module under the name of MemOS's, so that pickles of `item` name the class as MemOS's do."""
    parts = MODULE.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    module = sys.modules[MODULE]
    for cls, name in ((item, "KVCacheItem"), (KVCacheRecords, "KVCacheRecords")):
        monkeypatch.setattr(cls, "__module__", MODULE)
        setattr(module, name, cls)
    return module
