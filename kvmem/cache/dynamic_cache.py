"""Builds, views, crops, joins and measures transformers' DynamicCache. Only `layers` also knows its internals.

Layout (transformers 5.16 to 5.19): `cache.layers[i].keys` and `.values`, each (batch, kv_heads, tokens, head_dim), keys
after RoPE. A layer also has `is_initialized`, `dtype` and `device`. If they are unset, the layer reports length 0 and
the model silently ignores it, so every cache is built in this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvmem.cache.fingerprint import ModelFingerprint
from kvmem.cache.items import MemoryTokens
from kvmem.cache.layers import KV, CopyOnWriteLayer, PatchedLayer, SlidingView, TransferLayer
from kvmem.cache.mapped_files import MappedFile, files_of
from kvmem.errors import CacheInUseError, FingerprintError, ModelError


class CacheView(DynamicCache):
    """A copy-on-write view of stored memories, as a DynamicCache. Using it leaves the stored tensors unchanged."""

    tokens: MemoryTokens
    """The token ids of the view, against which the prefix of a query's prompt is verified."""
    note: str = ""
    """Why a stored memory is not part of the view, as a sentence; "" if every memory is."""
    lossy: str = ""
    """The lossy forms that the keys and values went through, such as "int8"; "" if they are the bits as built."""
    fingerprint: ModelFingerprint | None = None
    """The model that the view is for; None if unknown."""

    @contextmanager
    def exclusively(self) -> Iterator[None]:
        """Inside the block no other answer may use the view: an answer grows it.

        Raises CacheInUseError if another thread, or an unfinished stream, is using it.
        """
        me = object()
        if self.__dict__.setdefault("_user", me) is not me:  # one operation: two threads can't both succeed
            raise CacheInUseError(
                "This view is in use by another answer, on another thread or in a stream that is not finished. Every "
                "answer at a time needs a view of its own: call get_cache for each; it copies nothing."
            )
        try:
            yield
        finally:
            del self.__dict__["_user"]


CacheT = TypeVar("CacheT", bound=DynamicCache)

_files: WeakKeyDictionary[DynamicCache, tuple[MappedFile, ...]] = WeakKeyDictionary()
"""The files that the tensors of a cache are mapped from. Beside the caches, which are pickled as they are."""


def _empty(config: PreTrainedConfig, kind: type[CacheT]) -> CacheT:
    """A cache of `kind` with a layer for each of the model's. Raises ModelError for a layer kind without keys."""
    cache = kind(config=config)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            if kind is CacheView:
                cache.layers[i] = CopyOnWriteLayer()
        elif type(layer) is DynamicSlidingWindowLayer:
            if kind is CacheView:
                cache.layers[i] = SlidingView(layer.sliding_window)
        else:
            raise ModelError(
                f"{config.model_type} has a layer of kind {type(layer).__name__}, whose state is not a list of keys "
                "and values. Supported: full and sliding-window attention."
            )
    return cache


def check_layer_kinds(config: PreTrainedConfig) -> None:
    """Raises ModelError for a model with a layer whose state is not keys and values of each token."""
    _empty(config, DynamicCache)


def layout_fault(cache: DynamicCache, tokens: int) -> str | None:
    """What in a cache that a model filled with `tokens` can't be stored, as the end of "it …"; None if all can."""
    for i, layer in enumerate(_attention_layers(cache)):
        if layer.keys is None or layer.values is None:
            return (
                f"keeps no keys and values of a text in layer {i}: that layer has another state, or attends to images"
            )
        keys, values = tuple(layer.keys.shape), tuple(layer.values.shape)
        if keys != values:
            return f"has keys of shape {keys} and values of shape {values} in layer {i}, as latent attention does"
        held = keys[-2] if len(keys) == 4 and keys[0] == 1 else 0
        if held != tokens and not (isinstance(layer, DynamicSlidingWindowLayer) and 0 < held < tokens):
            return f"has keys of shape {keys} in layer {i}, not (1, heads, {tokens}, head size), for {tokens} tokens"
    return None


def _attention_layers(cache: DynamicCache) -> list[DynamicLayer]:
    """The layers of a cache that was built here: `_empty` refuses every other kind."""
    return cast("list[DynamicLayer]", cache.layers)


def _fill(cache: DynamicCache, layers: Iterable[KV], tokens: int) -> None:
    for layer, (keys, values) in zip(_attention_layers(cache), layers, strict=True):
        layer.keys, layer.values = keys, values
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = tokens
            layer._sliding_window_tensor = layer._sliding_window_tensor.to(keys.device)


def from_layers(layers: Sequence[KV], config: PreTrainedConfig, tokens: int | None = None) -> DynamicCache:
    """A DynamicCache for the model of `config` that shares the given tensors.

    `tokens`: how many tokens the cache stands for. It differs from the tensors' length only on sliding layers.
    """
    cache = _empty(config, DynamicCache)
    _fill(cache, layers, max(keys.shape[-2] for keys, _ in layers) if tokens is None else tokens)
    if files := files_of(tensor for pair in layers for tensor in pair):
        _files[cache] = files
    return cache


def from_transfer(
    layers: Sequence[KV], ready_events: Sequence[torch.cuda.Event], config: PreTrainedConfig
) -> DynamicCache:
    """As `from_layers`, for full attention, while the tensors are still being copied.

    `ready_events`: one event for each layer, recorded behind the copies of its keys and values.
    """
    cache = _empty(config, DynamicCache)
    cache.layers = [TransferLayer(ready) for ready in ready_events]
    _fill(cache, layers, layers[0][0].shape[-2])
    return cache


def patched(layers: Sequence[KV], at_S: torch.Tensor) -> DynamicCache:
    """A cache of a model's first layers. A forward pass overwrites the tokens at the indices `at`, (new,) int64."""
    cache = DynamicCache()
    cache.layers = [PatchedLayer(keys, values, at_S) for keys, values in layers]
    return cache


def check_files(cache: DynamicCache) -> None:
    """Raises ChangedFileError if a file that tensors of the cache are mapped from changed after it was loaded."""
    for file in _files.get(cache, ()):
        file.check()


def layers_of(cache: DynamicCache) -> list[KV]:
    """The (keys, values) of each layer, each (batch, kv_heads, tokens, head_dim); not copied. Waits for transfers.

    Raises ChangedFileError as `check_files`.
    """
    check_files(cache)
    for layer in cache.layers:
        if isinstance(layer, TransferLayer):
            layer.wait()
    return _tensors(cache)


def _tensors(cache: DynamicCache) -> list[KV]:
    """As `layers_of`, without waiting for pending transfers."""
    pairs = []
    for layer in _attention_layers(cache):
        assert layer.keys is not None and layer.values is not None
        pairs.append((layer.keys, layer.values))
    return pairs


def compact(layers: Iterable[KV]) -> list[KV]:
    """The same values in tensors that fill their storage; a tensor that is a view into a larger one is copied.

    A copy-on-write layer's buffer has free space, and a sliding layer's storage holds tokens that left the window.
    """
    return [(_compacted(keys), _compacted(values)) for keys, values in layers]


def _compacted(tensor: torch.Tensor) -> torch.Tensor:
    fills_storage = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if fills_storage else tensor.clone(memory_format=torch.contiguous_format)


def view_of(
    cache: DynamicCache,
    tokens: MemoryTokens,
    config: PreTrainedConfig,
    lossy: str = "",
    fingerprint: ModelFingerprint | None = None,
) -> CacheView:
    """A view that shares the tensors of `cache`; growing, cropping or reordering it leaves `cache` unchanged.

    Raises FingerprintError if `cache` has another number of layers than the model of `config`, and ChangedFileError as
    `check_files`.
    """
    check_files(cache)
    view = _empty(config, CacheView)
    if len(cache.layers) != len(view.layers):
        raise FingerprintError(
            f"The cache has {len(cache.layers)} layers and this model {len(view.layers)}. Extract the memory again "
            "with this model."
        )
    _fill(view, _tensors(cache), cache.get_seq_length())
    for layer, stored in zip(view.layers, cache.layers, strict=True):
        if isinstance(layer, TransferLayer) and isinstance(stored, TransferLayer):
            layer.ready = stored.ready
    if cache in _files:
        _files[view] = _files[cache]
    view.tokens, view.lossy, view.fingerprint = tokens, lossy, fingerprint
    return view


def empty_view(tokens: MemoryTokens, config: PreTrainedConfig) -> CacheView:
    """A view without tokens, for a prompt whose memory is sent as text; it grows as any view does."""
    view = _empty(config, CacheView)
    view.tokens = tokens.model_copy(update={"token_ids": ()})
    return view


def can_crop(cache: DynamicCache, tokens: int) -> bool:
    """Whether `crop` to `tokens` is possible: False if a sliding layer already dropped tokens that it would need."""
    return tokens >= cache.get_seq_length() or not any(
        isinstance(layer, DynamicSlidingWindowLayer)
        and layer.keys is not None
        and layer.cumulative_length > layer.keys.shape[-2]
        for layer in cache.layers
    )


def crop(cache: DynamicCache, tokens: int) -> bool:
    """Keeps the first `tokens` tokens, in place, without a copy. Returns False and does nothing if not `can_crop`."""
    if tokens >= cache.get_seq_length():
        return True
    if not can_crop(cache, tokens):
        return False
    for layer in _attention_layers(cache):
        assert layer.keys is not None and layer.values is not None
        layer.keys, layer.values = layer.keys[..., :tokens, :], layer.values[..., :tokens, :]
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = tokens
    return True


def cut(cache: DynamicCache, start: int, end: int) -> list[KV]:
    """The tokens `start` to `end` (exclusive) of each layer, not copied."""
    return [(keys[..., start:end, :], values[..., start:end, :]) for keys, values in layers_of(cache)]


def join(blocks: Sequence[Sequence[KV]]) -> list[KV]:
    """Concatenates blocks of tokens, layer by layer, into new tensors."""
    return [
        (torch.cat([keys for keys, _ in parts], dim=-2), torch.cat([values for _, values in parts], dim=-2))
        for parts in zip(*blocks, strict=True)
    ]


def to_device(cache: DynamicCache, device: torch.device | str, config: PreTrainedConfig) -> DynamicCache:
    """The same cache on another device. Tensors that are already there are shared."""
    return from_layers([(k.to(device), v.to(device)) for k, v in layers_of(cache)], config, cache.get_seq_length())


def nbytes(cache: DynamicCache) -> int:
    """Bytes of all keys and values."""
    return sum(t.numel() * t.element_size() for pair in _tensors(cache) for t in pair)


def has_sliding_layers(config: PreTrainedConfig) -> bool:
    """Whether any layer of the model has sliding-window attention."""
    return any(isinstance(layer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers)


def layer_count(config: PreTrainedConfig) -> int:
    """The number of layers of the model's cache. Layers that share the keys and values of others have none in it."""
    return len(DynamicCache(config=config).layers)


def has_equal_layers(config: PreTrainedConfig) -> bool:
    """Whether all layers of the model have the same number of heads, of the same size."""
    differ = getattr(config, "is_heterogeneous", False) or getattr(config, "global_head_dim", None)
    return not differ
