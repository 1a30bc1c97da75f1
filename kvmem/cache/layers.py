"""Layers of transformers' DynamicCache that differ in how they read or store new tokens."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

KV = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, each (batch, kv_heads, tokens, head_dim)."""

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
            free_BHTD = key_states.new_empty(*key_states.shape[:2], self.headroom, key_states.shape[-1])
            self.buffers = (
                torch.cat([self.keys, key_states, free_BHTD], dim=-2),
                torch.cat([self.values, value_states, free_BHTD], dim=-2),
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
