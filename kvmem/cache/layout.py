"""What the layers of a model keep of a memory: names, shapes and dtypes, and the bytes that follow from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from pydantic import BaseModel, ConfigDict

from kvmem.cache.layers import ENTRIES, KEYS, VALUES

TensorLayout = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a tensor."""


class KeptTensor(BaseModel):
    """One tensor of a layer: an entry for each token, or a state. See `kvmem.cache.layers`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Of an entry, that of one token."""

    @property
    def is_entry(self) -> bool:
        """Whether the tensor grows with the tokens."""
        return self.name in ENTRIES

    @property
    def nbytes(self) -> int:
        """Bytes of a state, or of one token of an entry."""
        itemsize: int = getattr(torch, self.dtype).itemsize
        return math.prod(self.shape) * itemsize

    def at(self, tokens: int) -> TensorLayout:
        """Dtype and shape in a memory of so many tokens."""
        shape = (*self.shape[:-2], tokens, self.shape[-1]) if self.is_entry else self.shape
        return getattr(torch, self.dtype), shape

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> KeptTensor:
        """What the tensor of this name is, whatever its number of tokens."""
        shape = tuple(tensor.shape)
        if name in ENTRIES:
            shape = (*shape[:-2], 1, shape[-1])
        return cls(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=shape)

    def __str__(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.shape))} {self.dtype}"


class CacheLayout(BaseModel):
    """What each layer keeps, in the order in which files have it; a layer without a cache of its own keeps nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[tuple[KeptTensor, ...], ...]

    @classmethod
    def of(cls, contents: Sequence[Mapping[str, torch.Tensor]]) -> CacheLayout:
        """The layout of a cache, by what its layers keep."""
        return cls(layers=tuple(tuple(KeptTensor.of(name, kept[name]) for name in kept) for kept in contents))

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """The names of what each layer keeps."""
        return tuple(tuple(tensor.name for tensor in layer) for layer in self.layers)

    @property
    def bytes_a_token(self) -> int:
        """Bytes of each token's entries, on all layers."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer if tensor.is_entry)

    @property
    def bytes_a_memory(self) -> int:
        """Bytes of the states of a memory of any length, on all layers."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer if not tensor.is_entry)

    @property
    def has_keys_and_values_only(self) -> bool:
        """Whether every layer keeps keys and values, of whatever sizes, and nothing else."""
        return all(names == (KEYS, VALUES) for names in self.names)

    @property
    def has_states(self) -> bool:
        """Whether any layer keeps a state."""
        return any(not tensor.is_entry for layer in self.layers for tensor in layer)

    def difference(self, other: CacheLayout) -> str | None:
        """The first layer in which `other` keeps something else, as "layer 3: X here, Y there"; None if none."""
        if len(self.layers) != len(other.layers):
            return f"layers: {len(self.layers)} here, {len(other.layers)} there"
        for i, (ours, theirs) in enumerate(zip(self.layers, other.layers, strict=True)):
            if ours != theirs:
                return f"layer {i}: {_described(ours)} here, {_described(theirs)} there"
        return None


def _described(layer: Sequence[KeptTensor]) -> str:
    return ", ".join(map(str, layer)) or "nothing"
