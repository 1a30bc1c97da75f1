"""How a layer of transformers' DynamicCache takes new tokens, where it is not by growing what it holds."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicLayer

KV = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, each (batch, kv_heads, tokens, head_dim)."""

FIRST_HEADROOM = 64


class TransferLayer(DynamicLayer):
    """A layer whose tensors may still be on their way to a GPU. Who reads them lets its stream wait first."""

    def __init__(self, arrives: torch.cuda.Event | None = None) -> None:
        super().__init__()
        self.arrives = arrives

    def wait(self) -> None:
        """The current stream waits for the tensors; the host does not."""
        if self.arrives is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrives)
            self.arrives = None


class CopyOnWriteLayer(TransferLayer):
    """A layer that starts from tensors it must not write to, and grows without copying them at each step.

    The first update copies the lent tokens and the new ones into a buffer of its own with room to spare (one `cat`,
    as a plain DynamicLayer does); later ones write into that room until it is full, and then double it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.buffers: KV | None = None
        self.headroom = FIRST_HEADROOM

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> KV:
        if not self.is_initialized:
            return super().update(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self.wait()
        start, new = self.keys.shape[-2], key_states.shape[-2]
        end = start + new
        owned = self._owns(self.keys)
        if not owned or self.buffers is None or end > self.buffers[0].shape[-2]:
            if owned:  # full; a beam search, which owns nothing after each reorder, must not double it
                self.headroom *= 2
            room_BHTD = key_states.new_empty(*key_states.shape[:2], self.headroom, key_states.shape[-1])
            self.buffers = (
                torch.cat([self.keys, key_states, room_BHTD], dim=-2),
                torch.cat([self.values, value_states, room_BHTD], dim=-2),
            )
        else:
            self.buffers[0][:, :, start:end].copy_(key_states)
            self.buffers[1][:, :, start:end].copy_(value_states)
        # narrow, for it costs the host half of what a slice does, and eager prefill on a GPU waits for the host
        self.keys, self.values = self.buffers[0].narrow(2, 0, end), self.buffers[1].narrow(2, 0, end)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.wait()
        super().batch_repeat_interleave(repeats)

    def _owns(self, keys: torch.Tensor) -> bool:
        """False after a beam reorder or batch repeat put other tensors in place of the buffer's head, and for a buffer
        made in inference mode that is to be written outside of it."""
        if self.buffers is None:
            return False
        own = self.buffers[0]
        if own.is_inference() and not torch.is_inference_mode_enabled():
            return False
        return keys.data_ptr() == own.data_ptr() and keys.shape[:2] == own.shape[:2] and keys.stride() == own.stride()


class PatchedLayer(DynamicLayer):
    """It does not grow: what comes overwrites the tokens `at`, in place."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, at_S: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.at_S = keys, values, at_S
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> KV:
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self.at_S, key_states)
        self.values.index_copy_(2, self.at_S, value_states)
        return self.keys, self.values
