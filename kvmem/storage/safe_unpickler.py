"""Unpickling without running anything: every name that a pickle may use becomes an inert record of our own."""

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

# What a pickle's virtual machine raises on bytes that are none: it checks little.
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


class _Frozen(type):
    """No attribute of such a class can be set, so a pickle can't change what the next one meets."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise TypeError(f"{cls.__name__} can't be changed")


class Record(metaclass=_Frozen):
    """Stands in for an object: keeps what the pickle gave it, and has no behaviour."""

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
        """The object's attributes: its state, or what pydantic keeps under `__dict__` there."""
        state = self.state if isinstance(self.state, dict) else {}
        inner = state.get("__dict__", state)
        return inner if isinstance(inner, dict) else {}


class Item(Record):
    """MemOS's KVCacheItem: id, memory, metadata, records; in older files kv_cache_id, kv_cache, metadata."""


class ItemRecords(Record):
    """MemOS's KVCacheRecords: text_memories, composed_text_memory, timestamp."""


class Cache(Record):
    """transformers' DynamicCache: a list of layers, or in older files key_cache and value_cache."""


class Layer(Record):
    """A layer of a DynamicCache: keys, values."""


class _Storage:
    """Bytes that torch wrote, as a storage: `torch.storage._load_from_bytes` itself would unpickle them unchecked."""

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
    """`torch._utils._rebuild_tensor_v2`, where it stays within its storage."""

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


class InertUnpickler(pickle.Unpickler):
    """Reads a pickle whose every name is in `ALLOWED`; any other raises UnsafeFileError before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise UnsafeFileError(f"it names {module}.{name}")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> NoReturn:
        raise UnsafeFileError("it names an object outside of it (persistent id)")


def load(file: Any, path: Path) -> Any:
    """The content of a pickle as plain values, tensors and Records. Raises UnsafeFileError or DamagedFileError."""
    try:
        return InertUnpickler(file).load()
    except UnsafeFileError as error:
        raise UnsafeFileError(
            f"{path} is refused: {error}, which no KV memory needs. Nothing of it was run. Extract the memory again."
        ) from None
    except MALFORMED as error:
        raise DamagedFileError(f"{path} is no whole pickle ({error}). Take another copy of the file.") from error
