"""Copies a cache from host memory to a GPU, layer by layer, overlapped with the forward pass that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from transformers import DynamicCache, PreTrainedConfig

from kvmem.cache import dynamic_cache
from kvmem.cache.layers import KV


def to_device(stored: DynamicCache, device: torch.device, config: PreTrainedConfig) -> DynamicCache:
    """The same cache on `device`. To a GPU it returns while the layers are still being copied, first layer first.

    In a view of the result, attention in each layer waits for that layer alone, so the forward pass hides the other
    copies. From pinned memory the host does not wait. A cache with anything but layers of full attention is copied
    completely before this returns.
    """
    if device.type != "cuda" or dynamic_cache.has_sliding_layers(config):
        return dynamic_cache.to_device(stored, device, config)
    if dynamic_cache.is_compacted(stored) or not dynamic_cache.keeps_keys_and_values_only(config):
        return dynamic_cache.to_device(stored, device, config)
    layers = dynamic_cache.layers_of(stored)
    if layers[0][0].device.type == "cuda":
        return dynamic_cache.to_device(stored, device, config)
    targets, buffer = _allocate_like(layers, device)
    stream = _copy_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # that stream may still use the memory behind `targets`
    ready_events = []
    with torch.cuda.stream(stream):
        for source_pair, target_pair in zip(layers, targets, strict=True):
            for source, target in zip(source_pair, target_pair, strict=True):
                target.copy_(source, non_blocking=True)
            ready_events.append(torch.cuda.Event())
            ready_events[-1].record(stream)
    buffer.record_stream(stream)
    return dynamic_cache.from_transfer(targets, ready_events, config)


def _allocate_like(layers: Sequence[KV], device: torch.device) -> tuple[list[KV], torch.Tensor]:
    """Empty tensors shaped like `layers`, and the one allocation that holds them all.

    Two allocations per layer would cost the host milliseconds.
    """
    tensors = [tensor for pair in layers for tensor in pair]
    buffer = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=tensors[0].dtype, device=device)
    parts = buffer.split([tensor.numel() for tensor in tensors])
    views = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
    return list(zip(views[::2], views[1::2], strict=True)), buffer


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that copies to `device`, separate from the stream that computes."""
    return torch.cuda.Stream(device)
