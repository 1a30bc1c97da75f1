"""What a layer of transformers' cache keeps, and layers that differ in how they read or store new tokens.

A layer keeps `Contents`: tensors by name. An entry ("k", "v", "indexer") holds one value for each token, and can be cut
at any token. A state ("conv.0", "recurrent.0"), of linear attention or of a state-space layer, belongs to one position:
it sums up all tokens before it, has the same size for any number of them, and can't be cut. A model changes states in
place, so a view works on copies of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

KV = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, each (batch, kv_heads, tokens, head_dim)."""

Contents = dict[str, torch.Tensor]
"""What one layer keeps, by name. Tokens are the second to last dimension of an entry; a state has no such dimension."""

Layer = CacheLayerMixin | LinearAttentionCacheLayerMixin

KEYS, VALUES, INDEXER = "k", "v", "indexer"
ENTRIES = (KEYS, VALUES, INDEXER)
"""The names of entries. Every other name is a state's."""
CONV, RECURRENT = "conv", "recurrent"
"""What the names of states begin with; behind a dot follows the number of the state in its layer."""

INITIAL_HEADROOM_TOKENS = 64
"""Free tokens behind the prompt in a copy-on-write layer's first buffer."""


def _forget(layer: DynamicLayer) -> None:
    """Drops the layer's tensors before transformers' `reset`, which up to 5.18 overwrites them with zeros in place."""
    layer.keys = layer.values = None
    layer.is_initialized = False


class SlidingView(DynamicSlidingWindowLayer):
    """A layer of a view with a sliding window. `reset` leaves the shared tensors unchanged.

    It needs no copy on write: an update replaces its tensors by new ones.
    """

    def reset(self) -> None:
        _forget(self)
        super().reset()


class TransferLayer(DynamicLayer):
    """A layer whose tensors may still be in transfer to a GPU. Call `wait` before a kernel reads them."""

    def __init__(self, ready: torch.cuda.Event | None = None) -> None:
        """`ready` is recorded behind the copies into this layer; None if no transfer is pending."""
        super().__init__()
        self.ready = ready

    def wait(self) -> None:
        """Makes the current stream wait for the transfer. The host does not wait."""
        if self.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(self.ready)
            self.ready = None


class CopyOnWriteLayer(TransferLayer):
    """A layer that starts from shared tensors, never writes to them, and does not copy them at every step.

    The first update copies the shared tokens and the new ones into a buffer of its own with free space behind them
    (one `cat`, as in a plain DynamicLayer). Later updates write into the free space, and double it when it is full.
    """

    def __init__(self) -> None:
        super().__init__()
        self.buffers: KV | None = None
        self.headroom = INITIAL_HEADROOM_TOKENS

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KV:
        if not self.is_initialized:
            return super().update(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self.wait()
        start, new = self.keys.shape[-2], key_states.shape[-2]
        end = start + new
        owned = self._owns(self.keys)
        if not owned or self.buffers is None or end > self.buffers[0].shape[-2]:
            if owned:  # the buffer is full; a beam search owns no buffer after a reorder and must not double it
                self.headroom *= 2
            free_k, free_v = (_empty_tokens(states, self.headroom) for states in (key_states, value_states))
            self.buffers = (
                torch.cat([self.keys, key_states, free_k], dim=-2),
                torch.cat([self.values, value_states, free_v], dim=-2),
            )
        else:
            self.buffers[0][:, :, start:end].copy_(key_states)
            self.buffers[1][:, :, start:end].copy_(value_states)
        # `narrow` costs the host half of what a slice does, and eager prefill on a GPU is bound by the host.
        self.keys, self.values = self.buffers[0].narrow(2, 0, end), self.buffers[1].narrow(2, 0, end)
        return self.keys, self.values

    def reset(self) -> None:
        self.ready, self.buffers, self.headroom = None, None, INITIAL_HEADROOM_TOKENS
        _forget(self)
        super().reset()

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.wait()
        super().batch_repeat_interleave(repeats)

    def _owns(self, keys: torch.Tensor) -> bool:
        """Whether `keys` are the head of this layer's own writable buffer.

        False after a beam reorder or batch repeat replaced the tensors, and outside inference mode for a buffer that
        was made in it.
        """
        if self.buffers is None:
            return False
        own = self.buffers[0]
        if own.is_inference() and not torch.is_inference_mode_enabled():
            return False
        return keys.data_ptr() == own.data_ptr() and keys.shape[:2] == own.shape[:2] and keys.stride() == own.stride()


def _empty_tokens(like_BHTD: torch.Tensor, tokens: int) -> torch.Tensor:
    batch, heads, _, size = like_BHTD.shape
    return like_BHTD.new_empty(batch, heads, tokens, size)


class IndexedView(DynamicIndexedLayer):
    """A layer of a view with the keys of a sparse-attention indexer. An update replaces its tensors by new ones."""

    def reset(self) -> None:
        _forget(self)
        self.indexer_keys, self.is_indexer_initialized = None, False
        super().reset()


class HybridView(LinearAttentionAndFullAttentionLayer):
    """A layer of a view with states, and keys and values. An update replaces keys and values by new tensors."""

    def reset(self) -> None:
        _forget(self)
        super().reset()


class SlidingHybridView(LinearAttentionAndSlidingWindowAttentionLayer):
    """As `HybridView`, with a sliding window."""

    def reset(self) -> None:
        _forget(self)
        super().reset()


_VIEWS: dict[type[Layer], Callable[[Any], Layer]] = {
    DynamicLayer: lambda layer: CopyOnWriteLayer(),
    DynamicSlidingWindowLayer: lambda layer: SlidingView(layer.sliding_window),
    DynamicIndexedLayer: lambda layer: IndexedView(),
    LinearAttentionLayer: lambda layer: LinearAttentionLayer(layer.number_of_states),
    LinearAttentionAndFullAttentionLayer: lambda layer: HybridView(layer.number_of_states),
    LinearAttentionAndSlidingWindowAttentionLayer: lambda layer: SlidingHybridView(
        layer.sliding_window, layer.number_of_states
    ),
}
"""Makes the layer of a view for each kind of layer that is covered, from transformers' own one."""


INDEXED_SINCE = (5, 19)
"""Before this version of transformers, sparse attention miscounts several tokens that follow a cache: it adds a mask of
truth values to the scores of its indexer."""


def fault(layer: Layer) -> str:
    """Why a layer of this kind is not covered, as the end of a sentence; "" if it is."""
    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    if isinstance(layer, DynamicIndexedLayer) and version < INDEXED_SINCE:
        needed = ".".join(map(str, INDEXED_SINCE))
        return (
            f"which transformers {transformers.__version__} computes wrongly behind a cache. Install {needed} or later"
        )
    return "" if type(layer) in _VIEWS else "and what it keeps is not known here"


def view_layer(layer: Layer) -> Layer:
    """An empty layer for a view of a cache that has `layer`."""
    return _VIEWS[type(layer)](layer)


def contents(layer: Layer) -> Contents:
    """What the layer keeps, not copied; nothing if it was never filled."""
    kept: Contents = {}
    if isinstance(layer, CacheLayerMixin) and layer.keys is not None and layer.values is not None:
        kept |= {KEYS: layer.keys, VALUES: layer.values}
    if isinstance(layer, DynamicIndexedLayer) and layer.indexer_keys is not None:
        kept[INDEXER] = layer.indexer_keys
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for kind, states in ((CONV, layer.conv_states), (RECURRENT, layer.recurrent_states)):
            kept |= {f"{kind}.{i}": state for i, state in states.items() if state is not None}
    return kept


def fill(layer: Layer, kept: Mapping[str, torch.Tensor], tokens: int) -> None:
    """Gives an empty layer what it keeps of `tokens` tokens. The tensors are shared.

    A layer also has flags. If they are unset, it reports length 0 and the model silently ignores it.
    """
    if isinstance(layer, DynamicLayer) and KEYS in kept:
        layer.keys, layer.values = kept[KEYS], kept[VALUES]
        layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True
    if isinstance(layer, DynamicSlidingWindowLayer) and KEYS in kept:
        layer.cumulative_length = tokens
        if isinstance(layer, SlidingView):  # an engine with blocks stores the tokens that left the window, too
            beyond = max(kept[KEYS].shape[-2] - layer.sliding_window + 1, 0)
            layer.keys, layer.values = (kept[name][..., beyond:, :] for name in (KEYS, VALUES))
        layer._sliding_window_tensor = layer._sliding_window_tensor.to(layer.device)
    if isinstance(layer, DynamicIndexedLayer) and INDEXER in kept:
        layer.indexer_keys, layer.is_indexer_initialized = kept[INDEXER], True
        layer.indexer_dtype, layer.indexer_device = layer.indexer_keys.dtype, layer.indexer_keys.device
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        set_states(layer, states_of(kept))


def states_of(kept: Mapping[str, torch.Tensor]) -> Contents:
    """The states among what a layer keeps, not copied."""
    return {name: tensor for name, tensor in kept.items() if name not in ENTRIES}


def copied(states: Mapping[str, torch.Tensor]) -> Contents:
    """Copies, which a model may change."""
    return {name: state.clone() for name, state in states.items()}


def set_states(layer: Layer, states: Mapping[str, torch.Tensor]) -> None:
    """Gives the layer these states, which the model changes in place, instead of those that it has."""
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return
    device_and_dtype: Any = layer  # transformers declares them as None
    for name, state in states.items():
        kind, _, number = name.partition(".")
        i = int(number)
        if kind == CONV:
            layer.conv_states[i], layer.is_conv_states_initialized[i] = state, True
            layer.conv_kernel_size[i] = state.shape[-1]
            device_and_dtype.dtype, device_and_dtype.device = state.dtype, state.device
        else:
            layer.recurrent_states[i], layer.is_recurrent_states_initialized[i] = state, True
            device_and_dtype.device = state.device
        layer.has_previous_state[i] = True


def may_keep_states(layer: Layer) -> bool:
    """Whether a layer of this kind keeps states. One of a mixture of experts alone is of the same kind, without any."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def can_crop(layer: Layer, tokens: int, states_at: int) -> bool:
    """Whether a layer of more tokens can go back to `tokens`, where states of the position `states_at` are known.

    A sliding window has dropped tokens that it would need.
    """
    if isinstance(layer, DynamicSlidingWindowLayer) and layer.keys is not None:
        dropped = layer.cumulative_length > layer.keys.shape[-2]
        if dropped:
            return False
    has_states = isinstance(layer, LinearAttentionCacheLayerMixin) and any(layer.has_previous_state.values())
    return tokens == states_at or not has_states


def crop(layer: Layer, tokens: int) -> None:
    """Keeps the entries of the first `tokens` tokens, in place, without a copy. Needs `can_crop`."""
    if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
        layer.keys, layer.values = layer.keys[..., :tokens, :], layer.values[..., :tokens, :]
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = tokens
    if isinstance(layer, DynamicIndexedLayer) and layer.indexer_keys is not None:
        layer.indexer_keys = layer.indexer_keys[..., :tokens, :]


class PatchedLayer(DynamicLayer):
    """A layer of fixed length: an update overwrites the tokens at the indices `at`, (new,) int64, in place."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, at_S: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.at_S = keys, values, at_S
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KV:
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self.at_S, key_states)
        self.values.index_copy_(2, self.at_S, value_states)
        return self.keys, self.values


class ContinuedLayer(DynamicLayer):
    """A layer that holds the first `start` tokens of fixed tensors. An update overwrites the tokens behind them."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, start: int) -> None:
        super().__init__()
        self.all_keys, self.all_values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._hold(start)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KV:
        start, new = self.get_seq_length(), key_states.shape[-2]
        self.all_keys[..., start : start + new, :] = key_states
        self.all_values[..., start : start + new, :] = value_states
        return self._hold(start + new)

    def _hold(self, tokens: int) -> KV:
        self.keys, self.values = self.all_keys[..., :tokens, :], self.all_values[..., :tokens, :]
        return self.keys, self.values


class LayersComputed(Exception):
    """Ends a forward pass behind the layers whose keys and values are wanted."""


class EndLayer(DynamicLayer):
    """The layer behind those whose keys and values are wanted: it ends the forward pass."""

    def __init__(self) -> None:
        super().__init__()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KV:
        raise LayersComputed


class ShiftedLayer(DynamicLayer):
    """A layer without tokens that says it has `tokens` of them, so that a model places the next ones behind."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def get_seq_length(self) -> int:
        return self.tokens + super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return super().get_seq_length() + query_length, self.tokens
