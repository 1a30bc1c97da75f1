"""Host memory to GPU, layer by layer, behind the forward pass that wants it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from transformers import DynamicCache, PreTrainedConfig

from kvmem.cache import dynamic_cache
from kvmem.cache.dynamic_cache import KV


def to_device(stored: DynamicCache, device: torch.device, config: PreTrainedConfig) -> DynamicCache:
    """The same cache on `device`; on a GPU its layers are on their way there when this returns, the first one first.

    A cache lent from it has each layer's attention wait for that layer alone, so that the forward pass hides all other
    transfers. From pinned memory the host waits for nothing. Sliding layers are copied before this returns.
    """
    layers = dynamic_cache.layers_of(stored)
    moves = device.type == "cuda" and layers[0][0].device.type != "cuda"
    if not moves or dynamic_cache.has_sliding_layers(config):
        return dynamic_cache.to_device(stored, device, config)
    targets, flat = _beside(layers, device)
    stream = _copies(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # the targets' memory may be in use there until now
    arrives = []
    with torch.cuda.stream(stream):
        for pair, target in zip(layers, targets, strict=True):
            for source, copy in zip(pair, target, strict=True):
                copy.copy_(source, non_blocking=True)
            arrives.append(torch.cuda.Event())
            arrives[-1].record(stream)
    flat.record_stream(stream)
    return dynamic_cache.arriving(targets, arrives, config)


def _beside(layers: Sequence[KV], device: torch.device) -> tuple[list[KV], torch.Tensor]:
    """Room for all layers in one allocation, which it also gives: two a layer would cost the host milliseconds."""
    parts = [part for pair in layers for part in pair]
    flat = torch.empty(sum(part.numel() for part in parts), dtype=parts[0].dtype, device=device)
    views = [
        view.view(part.shape) for view, part in zip(flat.split([part.numel() for part in parts]), parts, strict=True)
    ]
    return list(zip(views[::2], views[1::2], strict=True)), flat


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream that copies to `device`, beside the one that computes."""
    return torch.cuda.Stream(device)
