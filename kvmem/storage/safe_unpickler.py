"""Unpickles without running code: each name that a pickle may use becomes an inert record or a safe function."""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import IO, Any, NoReturn

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
    AssertionError,
    struct.error,
    zipfile.BadZipFile,
)
"""The errors of an unpickler, and of torch's reader of storages, on bytes that are neither. They validate little."""


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

    @classmethod
    def with_fields(cls, **fields: Any) -> Layer:
        """A layer of an older file, which has lists of keys and of values instead."""
        layer = cls()
        layer.__setstate__(fields)
        return layer


class StateLayer(Layer):
    """A layer with states, by number: conv_states, recurrent_states. It may also have keys and values, or nothing."""


class Tensor(Record):
    """A tensor. Not the tensor itself: the state that a pickle may give to an object is code of torch for a tensor."""

    @property
    def tensor(self) -> torch.Tensor:
        value: torch.Tensor = self.args[0]
        return value


class Bytes(Record):
    """A storage of a tensor, behind a record for the same reason."""

    @property
    def storage(self) -> torch.storage.TypedStorage | torch.UntypedStorage:
        value: torch.storage.TypedStorage | torch.UntypedStorage = self.args[0]
        return value


class Nothing(Record):
    """An object whose content is not needed: it is accepted, and dropped."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def tensor_of(value: Any) -> torch.Tensor | None:
    """The tensor that `value` stands for; None if it stands for something else."""
    return value.tensor if isinstance(value, Tensor) else None


class _Budget(metaclass=_Frozen):
    """How many bytes of tensors a pickle may still make: as many as it has. A few bytes of it could repeat a call."""

    __slots__ = ("left",)

    def __init__(self, size: int) -> None:
        self.left = size

    def spend(self, nbytes: int) -> None:
        self.left -= nbytes
        if self.left < 0:
            raise ValueError("its tensors have more bytes than it has")


class _Function(metaclass=_Frozen):
    """A function that a pickle may call. It has no state that a pickle could set."""

    __slots__ = ("budget",)

    def __init__(self, budget: _Budget) -> None:
        self.budget = budget

    def __setstate__(self, state: Any) -> NoReturn:
        raise TypeError("a function has no state")


class _LoadStorage(_Function):
    """Replaces `torch.storage._load_from_bytes`, which would unpickle its argument without any check."""

    def __call__(self, raw: Any) -> Bytes:
        if not isinstance(raw, bytes):
            raise ValueError("a tensor's bytes that are none")
        self.budget.spend(len(raw))
        if zipfile.is_zipfile(io.BytesIO(raw)):  # torch's current format; its reader would inflate what is compressed
            entries = zipfile.ZipFile(io.BytesIO(raw)).infolist()
            if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > len(raw):
                raise ValueError("a tensor's bytes are compressed")
        try:
            storage = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            if named:
                raise UnsafeFileError(f"a tensor's bytes name {named[1]}") from None
            raise
        if not isinstance(storage, torch.UntypedStorage | torch.storage.TypedStorage):
            raise ValueError(f"a tensor's bytes hold a {type(storage).__name__}")
        held = storage if isinstance(storage, torch.UntypedStorage) else storage._untyped_storage
        if held.nbytes() > len(raw):
            raise ValueError("a tensor's storage is larger than its bytes")
        return Bytes(storage)


class _RebuildTensor(_Function):
    """Replaces `torch._utils._rebuild_tensor_v2`, and refuses a tensor that reaches beyond its storage."""

    def __call__(self, holder: Any, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor:
        storage = holder.storage if isinstance(holder, Bytes) else None
        if not isinstance(storage, torch.storage.TypedStorage):
            raise ValueError("a tensor without a typed storage")
        size, stride = (each.args[0] if isinstance(each, Record) else each for each in (size, stride))  # torch.Size
        raw = storage._untyped_storage
        reach = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if all(size) else offset
        if min((offset, *size, *stride)) < 0 or reach * storage.dtype.itemsize > raw.nbytes():
            raise ValueError("a tensor reaches beyond its storage")
        nbytes = math.prod(size) * storage.dtype.itemsize
        if nbytes > raw.nbytes():  # its strides repeat elements
            raise ValueError("a tensor has more elements than its storage")
        self.budget.spend(nbytes)
        return Tensor(torch.empty(0, dtype=storage.dtype).set_(raw, offset, size, stride))


ALLOWED: dict[tuple[str, str], Any] = {
    ("memos.memories.activation.item", "KVCacheItem"): Item,
    ("memos.memories.activation.item", "KVCacheRecords"): ItemRecords,
    ("transformers.cache_utils", "DynamicCache"): Cache,
    ("transformers.cache_utils", "DynamicLayer"): Layer,
    ("transformers.cache_utils", "DynamicSlidingWindowLayer"): Layer,
    ("transformers.cache_utils", "DynamicIndexedLayer"): Layer,
    ("transformers.cache_utils", "LinearAttentionLayer"): StateLayer,
    ("transformers.cache_utils", "LinearAttentionAndFullAttentionLayer"): StateLayer,
    ("transformers.cache_utils", "LinearAttentionAndSlidingWindowAttentionLayer"): StateLayer,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor,
    ("torch.storage", "_load_from_bytes"): _LoadStorage,
    ("torch", "device"): Record,
    ("torch", "Size"): Record,
    ("collections", "OrderedDict"): Nothing,
    ("builtins", "set"): Nothing,
    ("uuid", "UUID"): Record,
    ("datetime", "datetime"): Record,
    ("datetime", "timezone"): Record,
    ("datetime", "timedelta"): Record,
    ("pydantic_core._pydantic_core", "TzInfo"): Record,
    ("torch", "float64"): torch.float64,
    ("torch", "float32"): torch.float32,
    ("torch", "float16"): torch.float16,
    ("torch", "bfloat16"): torch.bfloat16,
}


# The unpickler written in Python: the one in C allocates a table as long as the largest index that a pickle names, so
# that ten bytes of a file take 32 GB. It is as fast for memories, whose bytes are in a few large strings.
class SafeUnpickler(pickle._Unpickler):
    """Reads a pickle whose names are all in `ALLOWED`. Raises UnsafeFileError for another, without importing it."""

    def __init__(self, file: Any, size: int) -> None:
        """size: of the file, in bytes."""
        super().__init__(file)
        budgets = {_LoadStorage: _Budget(size), _RebuildTensor: _Budget(size)}
        self._functions = {function: function(budget) for function, budget in budgets.items()}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise UnsafeFileError(f"it names {module}.{name}")
        allowed = ALLOWED[module, name]
        return self._functions.get(allowed, allowed)

    def persistent_load(self, pid: Any) -> NoReturn:
        raise UnsafeFileError("it names an object outside of it (persistent id)")


def load(file: IO[bytes], path: Path) -> Any:
    """The content of a pickle as plain values and Records.

    Raises UnsafeFileError for a name that is not allowed, and DamagedFileError for bytes that are not a pickle.
    """
    try:
        return SafeUnpickler(file, os.fstat(file.fileno()).st_size).load()
    except UnsafeFileError as error:
        raise UnsafeFileError(
            f"{path} is refused: {error}, which no KV memory needs. No code in it was run. Extract the memory again."
        ) from None
    except MALFORMED as error:
        raise DamagedFileError(f"{path} is not a complete pickle ({error}). Take another copy of the file.") from error
