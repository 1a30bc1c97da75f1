"""The file that reaches inside transformers' DynamicCache: lend, join, crop, move, count bytes. Its layers' own ways of
growing are in `cache_layers.py`; nothing else knows of either.

Layout (transformers 5.16 to 5.19): `cache.layers[i].keys` and `.values`, each (batch, kv_heads, tokens, head_dim), keys
after RoPE. A layer also carries `is_initialized`, `dtype` and `device`; a layer built by hand that leaves them unset
reports length 0 and is silently ignored, so caches are built here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvmem.cache.fingerprint import ModelFingerprint
from kvmem.cache.items import MemoryTokens
from kvmem.cache.layers import KV, CopyOnWriteLayer, PatchedLayer, TransferLayer
from kvmem.errors import FingerprintError, ModelError


class CacheView(DynamicCache):
    """A DynamicCache lent from stored memories: using it leaves them as they are.

    `tokens` says which token ids it was lent with, so that a query can verify the prefix. `note`: why something that is
    stored was not lent, as a sentence; "" if there is nothing to tell. `lossy`: what its keys and values have been
    compressed to on their way ("int8"); "": they are the bits that were built. `fingerprint`: the model that it
    was lent for; None: that was not said.
    """

    tokens: MemoryTokens
    note: str = ""
    lossy: str = ""
    fingerprint: ModelFingerprint | None = None


def _shell(config: PreTrainedConfig, kind: type[DynamicCache]) -> DynamicCache:
    cache = kind(config=config)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            if kind is CacheView:
                cache.layers[i] = CopyOnWriteLayer()
        elif type(layer) is not DynamicSlidingWindowLayer:
            raise ModelError(
                f"{config.model_type} has a layer of kind {type(layer).__name__}, whose state is no list of keys and "
                "values. Covered: full and sliding-window attention."
            )
    return cache


def _attention_layers(cache: DynamicCache) -> list[DynamicLayer]:
    """The layers of a cache that was made here: `_shell` refuses every other kind."""
    return cast("list[DynamicLayer]", cache.layers)


def _fill(cache: DynamicCache, layers: Iterable[KV], tokens: int) -> None:
    for layer, (keys, values) in zip(_attention_layers(cache), layers, strict=True):
        layer.keys, layer.values = keys, values
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = tokens
            layer._sliding_window_tensor = layer._sliding_window_tensor.to(keys.device)


def from_layers(layers: Sequence[KV], config: PreTrainedConfig, tokens: int | None = None) -> DynamicCache:
    """A DynamicCache of `config`'s model around the given tensors (shared, not copied).

    `tokens` is the length of the text behind it; it differs from the tensors' only on sliding layers.
    """
    cache = _shell(config, DynamicCache)
    _fill(cache, layers, max(keys.shape[-2] for keys, _ in layers) if tokens is None else tokens)
    return cache


def arriving(layers: Sequence[KV], arrives: Sequence[torch.cuda.Event], config: PreTrainedConfig) -> DynamicCache:
    """As `from_layers`, for full attention, around tensors of which each layer's are there after its event."""
    cache = _shell(config, DynamicCache)
    cache.layers = [TransferLayer(event) for event in arrives]
    _fill(cache, layers, layers[0][0].shape[-2])
    return cache


def patched(layers: Sequence[KV], at_S: torch.Tensor) -> DynamicCache:
    """A cache of a model's first layers whose forward pass overwrites the tokens `at`, (new,) int64, of `layers`."""
    cache = DynamicCache()
    cache.layers = [PatchedLayer(keys, values, at_S) for keys, values in layers]
    return cache


def layers_of(cache: DynamicCache) -> list[KV]:
    """The (keys, values) of each layer, each (batch, kv_heads, tokens, head_dim); not copied."""
    for layer in cache.layers:
        if isinstance(layer, TransferLayer):
            layer.wait()
    return _tensors(cache)


def _tensors(cache: DynamicCache) -> list[KV]:
    """As `layers_of`, for who does not read them yet."""
    return [(layer.keys, layer.values) for layer in _attention_layers(cache)]  # type: ignore[misc]


def compact(layers: Iterable[KV]) -> list[KV]:
    """The same tensors, copied where they are views into larger ones: a lent layer's buffer has room to spare, and a
    sliding layer's tensors still hold the tokens that have left the window."""
    return [(_alone(keys), _alone(values)) for keys, values in layers]


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    fills = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if fills else tensor.clone(memory_format=torch.contiguous_format)


def view_of(
    cache: DynamicCache,
    tokens: MemoryTokens,
    config: PreTrainedConfig,
    lossy: str = "",
    fingerprint: ModelFingerprint | None = None,
) -> CacheView:
    """A fresh shell that shares `cache`'s tensors; growing, cropping or reordering it leaves `cache` as it is."""
    shell = cast("CacheView", _shell(config, CacheView))
    held, wanted = len(cache.layers), len(shell.layers)
    if held != wanted:
        raise FingerprintError(f"A cache of {held} layers is none of this model's {wanted}. Extract it again with it.")
    _fill(shell, _tensors(cache), cache.get_seq_length())
    for cache_view, stored in zip(shell.layers, cache.layers, strict=True):
        if isinstance(cache_view, TransferLayer) and isinstance(stored, TransferLayer):
            cache_view.arrives = stored.arrives
    shell.tokens, shell.lossy, shell.fingerprint = tokens, lossy, fingerprint
    return shell


def empty_view(tokens: MemoryTokens, config: PreTrainedConfig) -> CacheView:
    """An empty shell for a prompt whose memory is all text: it grows as a lent one does."""
    shell = cast("CacheView", _shell(config, CacheView))
    shell.tokens = tokens.model_copy(update={"token_ids": ()})
    return shell


def can_crop(cache: DynamicCache, tokens: int) -> bool:
    """False where a sliding layer has already dropped tokens that it would need behind the first `tokens`."""
    return tokens >= cache.get_seq_length() or not any(
        isinstance(layer, DynamicSlidingWindowLayer)
        and layer.keys is not None
        and layer.cumulative_length > layer.keys.shape[-2]
        for layer in cache.layers
    )


def crop(cache: DynamicCache, tokens: int) -> bool:
    """Keeps the first `tokens` tokens, in place, by views. False, and nothing done, where `can_crop` is."""
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
    """Tokens `start` to `end` of each layer, as views."""
    return [(keys[..., start:end, :], values[..., start:end, :]) for keys, values in layers_of(cache)]


def join(blocks: Sequence[Sequence[KV]]) -> list[KV]:
    """Blocks of tokens one behind the other, layer by layer; copies."""
    return [
        (torch.cat([keys for keys, _ in parts], dim=-2), torch.cat([values for _, values in parts], dim=-2))
        for parts in zip(*blocks, strict=True)
    ]


def to_device(cache: DynamicCache, device: torch.device | str, config: PreTrainedConfig) -> DynamicCache:
    """The same cache on another device; shares the tensors where they are there already."""
    return from_layers([(k.to(device), v.to(device)) for k, v in layers_of(cache)], config, cache.get_seq_length())


def nbytes(cache: DynamicCache) -> int:
    """Bytes of all keys and values."""
    return sum(t.numel() * t.element_size() for pair in _tensors(cache) for t in pair)


def has_sliding_layers(config: PreTrainedConfig) -> bool:
    return any(isinstance(layer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers)
