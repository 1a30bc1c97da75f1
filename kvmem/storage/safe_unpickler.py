"""Unpickles without running code: each name that a pickle may use becomes an inert record or a safe function."""

from __future__ import annotations

import io
import pickle
import re
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any, NoReturn

import torch

from kvmem.errors import DamagedFileError, UnsafeFileError

MALFORMED = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
    OverflowError,
    MemoryError,
    RuntimeError,
    struct.error,
)
"""The errors of an unpickler on bytes that are not a pickle. It validates little."""


class _Frozen(type):
    """A class whose attributes can't be set, so that one pickle can't affect how the next one is read."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise TypeError(f"{cls.__name__} can't be changed")


class Record(metaclass=_Frozen):
    """Replaces an object: keeps its arguments and state, and has no behavior."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Record:
        record = super().__new__(cls)
        record.__dict__.update(args=args, state={})
        return record

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state

    @property
    def fields(self) -> dict[str, Any]:
        """The object's attributes: its state, or the `__dict__` in the state of a pydantic object."""
        state = self.state if isinstance(self.state, dict) else {}
        inner = state.get("__dict__", state)
        return inner if isinstance(inner, dict) else {}


class Item(Record):
    """MemOS's KVCacheItem: id, memory, metadata, records. In older files: kv_cache_id, kv_cache, metadata."""


class ItemRecords(Record):
    """MemOS's KVCacheRecords: text_memories, composed_text_memory, timestamp."""


class Cache(Record):
    """transformers' DynamicCache: a list of layers. In older files: key_cache and value_cache."""


class Layer(Record):
    """A layer of a DynamicCache: keys, values."""


class _Storage:
    """Replaces `torch.storage._load_from_bytes`, which would unpickle its argument without any check."""

    def __new__(cls, raw: bytes) -> Any:
        try:
            storage = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            if named:
                raise UnsafeFileError(f"a tensor's bytes name {named[1]}") from None
            raise
        if not isinstance(storage, torch.UntypedStorage | torch.storage.TypedStorage):
            raise ValueError(f"a tensor's bytes hold a {type(storage).__name__}")
        return storage


class _Tensor:
    """Replaces `torch._utils._rebuild_tensor_v2`, and refuses a tensor that reaches beyond its storage."""

    def __new__(cls, storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> Any:
        if not isinstance(storage, torch.storage.TypedStorage):
            raise ValueError("a tensor without a typed storage")
        raw = storage._untyped_storage
        reach = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if all(size) else offset
        if min((offset, *size, *stride)) < 0 or reach * storage.dtype.itemsize > raw.nbytes():
            raise ValueError("a tensor reaches beyond its storage")
        return torch.empty(0, dtype=storage.dtype).set_(raw, offset, size, stride)


ALLOWED: dict[tuple[str, str], Any] = {
    ("memos.memories.activation.item", "KVCacheItem"): Item,
    ("memos.memories.activation.item", "KVCacheRecords"): ItemRecords,
    ("transformers.cache_utils", "DynamicCache"): Cache,
    ("transformers.cache_utils", "DynamicLayer"): Layer,
    ("transformers.cache_utils", "DynamicSlidingWindowLayer"): Layer,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch.storage", "_load_from_bytes"): _Storage,
    ("torch", "device"): Record,
    ("torch", "Size"): Record,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("uuid", "UUID"): Record,
    ("datetime", "datetime"): Record,
    ("datetime", "timezone"): Record,
    ("datetime", "timedelta"): Record,
    ("torch", "float64"): torch.float64,
    ("torch", "float32"): torch.float32,
    ("torch", "float16"): torch.float16,
    ("torch", "bfloat16"): torch.bfloat16,
}


class SafeUnpickler(pickle.Unpickler):
    """Reads a pickle whose names are all in `ALLOWED`. Raises UnsafeFileError for another, without importing it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise UnsafeFileError(f"it names {module}.{name}")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> NoReturn:
        raise UnsafeFileError("it names an object outside of it (persistent id)")


def load(file: Any, path: Path) -> Any:
    """The content of a pickle as plain values, tensors and Records.

    Raises UnsafeFileError for a name that is not allowed, and DamagedFileError for bytes that are not a pickle.
    """
    try:
        return SafeUnpickler(file).load()
    except UnsafeFileError as error:
        raise UnsafeFileError(
            f"{path} is refused: {error}, which no KV memory needs. No code in it was run. Extract the memory again."
        ) from None
    except MALFORMED as error:
        raise DamagedFileError(f"{path} is not a complete pickle ({error}). Take another copy of the file.") from error
