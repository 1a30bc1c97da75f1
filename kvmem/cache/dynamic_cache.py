"""Builds, views, crops, joins and measures transformers' DynamicCache. Only `layers` also knows its internals.

Layout (transformers 5.16 to 5.19): `cache.layers[i].keys` and `.values`, each (batch, kv_heads, tokens, head_dim), keys
after RoPE. With multi-head latent attention (DeepSeek V2 and V3, and what is built like them) they are what the model
caches instead: the compressed latent, and the rotated part of the key, each with one head. Layers of linear attention
and of state-space models keep states instead, or beside them: see `layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from kvmem.cache import layers as cache_layers
from kvmem.cache import own_classes
from kvmem.cache.compacted_layers import CompactedLayer, CompactedView
from kvmem.cache.fingerprint import ModelFingerprint
from kvmem.cache.items import MemoryTokens
from kvmem.cache.layers import (
    ENTRIES,
    KEYS,
    KV,
    VALUES,
    Contents,
    ContinuedLayer,
    EndLayer,
    PatchedLayer,
    ShiftedLayer,
    TransferLayer,
)
from kvmem.cache.mapped_files import MappedFile, files_of
from kvmem.errors import CacheInUseError, CompactionError, FingerprintError, ModelError


@dataclass(frozen=True)
class KeptPrefix:
    """The beginning of a prompt as KV, copied while an answer to the prompt was computed."""

    cache: DynamicCache
    token_ids: tuple[int, ...]
    """The tokens of `cache`."""
    lossy: str
    """The lossy forms that a part of it went through, such as "int8"; "" if none."""
    prefill_s: float
    """Seconds of the answer's prefill, which also computed the prompt's tokens behind these."""


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
    states: Sequence[Contents] = ()
    """The stored states of each layer, which the view shares; its layers work on copies of them."""
    states_at: int = -1
    """The position of the stored states: how many tokens the memory has. -1 without a memory."""
    keep: MemoryTokens | None = None
    """If set, a prefill that computes some of these tokens leaves a copy of their KV in `kept`."""
    kept: KeptPrefix | None = None
    """What the last prefill copied for `keep`; None if its prompt began otherwise, or it computed none of them."""
    tier: str = ""
    """The tier that the memory's KV came from; "" if it is not known, or there is none."""
    on_prefill: Callable[[int, int, float], None] | None = None
    """If set, called after each prefill with this view: the tokens it computed, the cached tokens before them, and its
    seconds, for which the prefill then waits for the device."""

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


def empty(config: PreTrainedConfig) -> DynamicCache:
    """A cache without tokens, of a class that the model accepts. Raises ModelError for a model that is not covered."""
    return _empty(config, DynamicCache, own_classes.class_for(config, DynamicCache))


def _empty(config: PreTrainedConfig, kind: type[CacheT], made: type[DynamicCache] | None = None) -> CacheT:
    """A cache of `kind` with a layer for each of the model's. Raises ModelError for a model that is not covered.

    made: the subclass of `kind` that is made; None: `kind` itself.
    """
    cache = cast("type[CacheT]", made or kind)(config=config)
    for i, layer in enumerate(cache.layers):
        if fault := cache_layers.fault(layer):
            raise ModelError(
                f"{config.model_type} has a layer of kind {type(layer).__name__}, {fault}. "
                "Covered are full, sliding-window and sparse attention, linear attention, and state-space layers."
            )
        if issubclass(kind, CacheView):
            cache.layers[i] = cache_layers.view_layer(layer)
    if cache.layers and not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        raise ModelError(
            f"{config.model_type} keeps states only, and a cache of states alone does not tell how many tokens it "
            "stands for. Covered are models with at least one attention layer."
        )
    return cache


def check_layer_kinds(config: PreTrainedConfig) -> None:
    """Raises ModelError for a model with a layer that keeps something that is not known here."""
    _empty(config, DynamicCache)


_OWN_FIELDS = {*vars(DynamicCache()), "linear_cache"}
"""The fields of a cache that no model has filled; the last one is MiniMax's, empty in `own_classes`."""


def layout_fault(cache: DynamicCache, tokens: int) -> str | None:
    """What in a cache that a model filled with `tokens` can't be stored, as the end of "it …"; None if all can."""
    if beside := sorted(set(vars(cache)) - _OWN_FIELDS):
        return f"keeps {', '.join(beside)} in the cache, beside what its layers keep"
    for i, layer in enumerate(cache.layers):
        kept = cache_layers.contents(layer)
        if isinstance(layer, DynamicLayer) and KEYS not in kept:
            return f"keeps no keys and values of a text in layer {i}: that layer attends to images, or to nothing"
        for name, tensor in kept.items():
            shape = tuple(tensor.shape)
            held = shape[-2] if name in ENTRIES and len(shape) > 1 else tokens
            slides = isinstance(layer, DynamicSlidingWindowLayer) and 0 < held < tokens
            if shape[0] != 1 or (held != tokens and not slides):
                return f"has {name} of shape {shape} in layer {i}, for one text of {tokens} tokens"
    return None


def from_layers(layers: Sequence[KV], config: PreTrainedConfig, tokens: int | None = None) -> DynamicCache:
    """As `from_contents`, for layers that keep keys and values: (keys, values) of each."""
    return from_contents([{KEYS: keys, VALUES: values} for keys, values in layers], config, tokens)


def from_contents(
    contents: Sequence[Mapping[str, torch.Tensor]],
    config: PreTrainedConfig,
    tokens: int | None = None,
    as_input: bool = False,
) -> DynamicCache:
    """A DynamicCache for the model of `config` that shares the given tensors: what each layer keeps.

    `tokens`: how many tokens the cache stands for. It differs from the tensors' length only on sliding layers.
    `as_input`: of a class that the model accepts, which then changes the given states. A stored cache needs none.
    """
    cache = empty(config) if as_input else _empty(config, DynamicCache)
    if tokens is None:
        tokens = max(kept[KEYS].shape[-2] for kept in contents if KEYS in kept)
    _fill(cache, contents, tokens)
    if files := files_of(tensor for kept in contents for tensor in kept.values()):
        _files[cache] = files
    return cache


def _fill(cache: DynamicCache, contents: Sequence[Mapping[str, torch.Tensor]], tokens: int) -> None:
    for layer, kept in zip(cache.layers, contents, strict=True):
        cache_layers.fill(layer, kept, tokens)


def from_compacted(
    contents: Sequence[Mapping[str, torch.Tensor]], entries: Sequence[Sequence[int]], tokens: int
) -> DynamicCache:
    """A stored cache of a compacted memory, which shares the given tensors.

    contents: packed tensors of each layer. entries: how many each of its KV heads has. tokens: the length of the text.
    """
    cache = DynamicCache()
    cache.layers = [CompactedLayer(kept, lengths, tokens) for kept, lengths in zip(contents, entries, strict=True)]
    if files := files_of(tensor for kept in contents for tensor in kept.values()):
        _files[cache] = files
    return cache


def is_compacted(cache: DynamicCache) -> bool:
    """Whether the cache, or the view, is of a compacted memory: its layers hold fewer entries than it has tokens."""
    return bool(cache.layers) and isinstance(cache.layers[0], CompactedLayer | CompactedView)


def layers_with_masks(cache: DynamicCache) -> list[CompactedView]:
    """The layers of a view of a compacted memory that need a mask of their own: all of them, or none."""
    return [layer for layer in cache.layers if isinstance(layer, CompactedView) and layer.needs_mask]


def from_transfer(
    layers: Sequence[KV], ready_events: Sequence[torch.cuda.Event], config: PreTrainedConfig
) -> DynamicCache:
    """As `from_layers`, for full attention, while the tensors are still being copied.

    `ready_events`: one event for each layer, recorded behind the copies of its keys and values.
    """
    cache = _empty(config, DynamicCache)
    cache.layers = [TransferLayer(ready) for ready in ready_events]
    _fill(cache, [{KEYS: keys, VALUES: values} for keys, values in layers], layers[0][0].shape[-2])
    return cache


def patched(layers: Sequence[KV], at_S: torch.Tensor, count: int) -> DynamicCache:
    """A cache for a model with `count` layers. A forward pass overwrites the tokens at the indices `at`, (new,) int64.

    layers: those of the model, or only the first ones; behind them the pass ends with LayersComputed.
    """
    return _of([PatchedLayer(keys, values, at_S) for keys, values in layers], count)


def continued(layers: Sequence[KV], start: int, count: int) -> DynamicCache:
    """As `patched`, for a forward pass that overwrites the tokens from `start` on and sees those before."""
    return _of([ContinuedLayer(keys, values, start) for keys, values in layers], count)


def shifted(tokens: int, config: PreTrainedConfig) -> DynamicCache:
    """An empty cache that says it has so many tokens: the next ones get positions behind, and attend to none of them.

    Every layer keeps all tokens that are added, those with a sliding window too.
    """
    return _of([ShiftedLayer(tokens) for _ in range(layer_count(config))], layer_count(config))


def _of(layers: Sequence[DynamicLayer], count: int) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [*layers, *(EndLayer() for _ in range(count - len(layers)))]
    return cache


def check_files(cache: DynamicCache) -> None:
    """Raises ChangedFileError if a file that tensors of the cache are mapped from changed after it was loaded."""
    for file in _files.get(cache, ()):
        file.check()


def contents_of(cache: DynamicCache) -> list[Contents]:
    """What each layer keeps, by name, not copied. Waits for transfers. Raises ChangedFileError as `check_files`."""
    check_files(cache)
    for layer in cache.layers:
        if isinstance(layer, TransferLayer):
            layer.wait()
    return _tensors(cache)


def layers_of(cache: DynamicCache) -> list[KV]:
    """The (keys, values) of each layer, each (batch, kv_heads, tokens, head_dim); not copied. Waits for transfers.

    Raises ModelError if a layer keeps anything else, such as states, CompactionError for a compacted memory, and
    ChangedFileError as `check_files`.
    """
    if is_compacted(cache):
        raise CompactionError(
            "This memory is compacted: it holds no entry for each token, which this operation needs. Use it on "
            "backend=huggingface, or extract the text again without compaction."
        )
    pairs = []
    for i, kept in enumerate(contents_of(cache)):
        if set(kept) != {KEYS, VALUES}:
            raise ModelError(
                f"Layer {i} of this cache keeps {', '.join(sorted(kept)) or 'nothing'}, and this operation is for "
                "layers that keep keys and values alone. Use backend=huggingface and merge=Reprefill for this model."
            )
        pairs.append((kept[KEYS], kept[VALUES]))
    return pairs


def _tensors(cache: DynamicCache) -> list[Contents]:
    """As `contents_of`, without waiting for pending transfers."""
    return [
        layer.contents() if isinstance(layer, CompactedLayer) else cache_layers.contents(layer)
        for layer in cache.layers
    ]


def converted(
    cache: DynamicCache, convert: Callable[[torch.Tensor], torch.Tensor], config: PreTrainedConfig
) -> DynamicCache:
    """A cache of the same tokens whose every tensor is `convert` of one of `cache`."""
    contents = [{name: convert(tensor) for name, tensor in kept.items()} for kept in contents_of(cache)]
    if is_compacted(cache):
        entries = [layer.lengths for layer in cache.layers if isinstance(layer, CompactedLayer)]
        return from_compacted(contents, entries, cache.get_seq_length())
    return from_contents(contents, config, cache.get_seq_length())


def compact(cache: DynamicCache, config: PreTrainedConfig) -> DynamicCache:
    """The same values in tensors that fill their storage; a tensor that is a view into a larger one is copied.

    A copy-on-write layer's buffer has free space, and a sliding layer's storage holds tokens that left the window.
    """
    return converted(cache, compacted, config)


def compacted(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in a tensor that fills its storage."""
    fills_storage = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if fills_storage else tensor.clone(memory_format=torch.contiguous_format)


def view_of(
    cache: DynamicCache,
    tokens: MemoryTokens,
    config: PreTrainedConfig,
    lossy: str = "",
    fingerprint: ModelFingerprint | None = None,
) -> CacheView:
    """A view that shares the entries of `cache` and copies its states; its use leaves `cache` unchanged.

    Raises FingerprintError if `cache` has another number of layers than the model of `config`, and ChangedFileError as
    `check_files`.
    """
    check_files(cache)
    view = _empty(config, CacheView, own_classes.class_for(config, CacheView))
    if len(cache.layers) != len(view.layers):
        raise FingerprintError(
            f"The cache has {len(cache.layers)} layers and this model {len(view.layers)}. Extract the memory again "
            "with this model."
        )
    view.tokens, view.lossy, view.fingerprint = tokens, lossy, fingerprint
    if is_compacted(cache):
        view.layers = _compacted_views(cache)
        if cache in _files:
            _files[view] = _files[cache]
        return view
    contents, tokens_held = _tensors(cache), cache.get_seq_length()
    view.states, view.states_at = [cache_layers.states_of(kept) for kept in contents], tokens_held
    own = [kept | cache_layers.copied(states) for kept, states in zip(contents, view.states, strict=True)]
    _fill(view, own, tokens_held)
    for layer, stored in zip(view.layers, cache.layers, strict=True):
        if isinstance(layer, TransferLayer) and isinstance(stored, TransferLayer):
            layer.ready = stored.ready
    if cache in _files:
        _files[view] = _files[cache]
    return view


def _compacted_views(cache: DynamicCache) -> list[cache_layers.Layer]:
    """The layers of a view. A model makes one mask for all layers, from the length of the first, and with no bias."""
    layers = [layer.view() for layer in cache.layers if isinstance(layer, CompactedLayer)]
    needs_mask = any(layer.bias_HT is not None or layer.entries != layers[0].entries for layer in layers)
    for layer in layers:
        layer.needs_mask = needs_mask
    return [*layers]


def empty_view(tokens: MemoryTokens, config: PreTrainedConfig) -> CacheView:
    """A view without tokens, for a prompt whose memory is sent as text; it grows as any view does."""
    view = _empty(config, CacheView, own_classes.class_for(config, CacheView))
    view.tokens = tokens.model_copy(update={"token_ids": ()})
    return view


def can_crop(cache: DynamicCache, tokens: int) -> bool:
    """Whether `crop` to `tokens` is possible.

    False if a sliding layer already dropped tokens that it would need, or if a layer keeps a state of another position:
    a view of a memory with states goes back to the end of the memory, and nowhere else. A view of a compacted memory
    goes back to the end of the memory, or to a token behind it.
    """
    if tokens >= cache.get_seq_length():
        return True
    if is_compacted(cache):
        return all(isinstance(layer, CompactedView) and layer.can_crop(tokens) for layer in cache.layers)
    states_at = cache.states_at if isinstance(cache, CacheView) else -1
    return all(cache_layers.can_crop(layer, tokens, states_at) for layer in cache.layers)


def crop(cache: DynamicCache, tokens: int) -> bool:
    """Keeps the first `tokens` tokens, in place. Returns False and does nothing if not `can_crop`."""
    if tokens >= cache.get_seq_length():
        return True
    if not can_crop(cache, tokens):
        return False
    for layer in cache.layers:
        if isinstance(layer, CompactedView):
            layer.crop_to(tokens)
        else:
            cache_layers.crop(layer, tokens)
    if isinstance(cache, CacheView):
        for layer, states in zip(cache.layers, cache.states, strict=False):  # a view without a memory has none
            cache_layers.set_states(layer, cache_layers.copied(states))
    return True


def first_tokens(cache: DynamicCache, tokens: int, config: PreTrainedConfig) -> DynamicCache:
    """A copy of the first `tokens` tokens of a cache whose layers keep all tokens, or that has exactly so many."""
    contents = [
        {
            name: (tensor[..., :tokens, :] if name in ENTRIES else tensor).clone(memory_format=torch.contiguous_format)
            for name, tensor in kept.items()
        }
        for kept in contents_of(cache)
    ]
    return from_contents(contents, config, tokens)


def cut(cache: DynamicCache, start: int, end: int) -> list[KV]:
    """The tokens `start` to `end` (exclusive) of each layer, not copied. Raises ModelError as `layers_of`."""
    return [(keys[..., start:end, :], values[..., start:end, :]) for keys, values in layers_of(cache)]


def join(blocks: Sequence[Sequence[KV]]) -> list[KV]:
    """Concatenates blocks of tokens, layer by layer, into new tensors."""
    return [
        (torch.cat([keys for keys, _ in parts], dim=-2), torch.cat([values for _, values in parts], dim=-2))
        for parts in zip(*blocks, strict=True)
    ]


def to_device(cache: DynamicCache, device: torch.device | str, config: PreTrainedConfig) -> DynamicCache:
    """The same cache on another device. Tensors that are already there are shared."""
    return converted(cache, lambda tensor: tensor.to(device), config)


def nbytes(cache: DynamicCache) -> int:
    """Bytes of everything that the layers keep."""
    return sum(tensor.numel() * tensor.element_size() for kept in _tensors(cache) for tensor in kept.values())


def has_state_layers(cache: DynamicCache) -> bool:
    """Whether a layer of the cache is of a kind that keeps states: linear attention, or a state-space layer."""
    return any(cache_layers.may_keep_states(layer) for layer in cache.layers)


def keeps_keys_and_values_only(config: PreTrainedConfig) -> bool:
    """Whether every layer of the model is of full or sliding-window attention."""
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in _model_layers(config))


def _model_layers(config: PreTrainedConfig) -> list[cache_layers.Layer]:
    return DynamicCache(config=config).layers


def has_sliding_layers(config: PreTrainedConfig) -> bool:
    """Whether any layer of the model has sliding-window attention."""
    return any(isinstance(layer, DynamicSlidingWindowLayer) for layer in _model_layers(config))


def layer_count(config: PreTrainedConfig) -> int:
    """The number of layers of the model's cache. Layers that share the keys and values of others have none in it."""
    return len(_model_layers(config))


def windows_of(config: PreTrainedConfig) -> list[int | None]:
    """The sliding window of each layer in tokens, or the length of its attention chunks; None: all tokens."""
    return [
        layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        for layer in _model_layers(config)
    ]


def has_equal_layers(config: PreTrainedConfig) -> bool:
    """Whether all layers of the model have the same number of heads, of the same size."""
    differ = getattr(config, "is_heterogeneous", False) or getattr(config, "global_head_dim", None)
    return not differ
