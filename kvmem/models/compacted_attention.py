"""Gives each decoder layer the mask of its own compacted memory: biases, and heads of different lengths.

A model makes one mask for all layers and heads. Hooks before the decoder layers replace it for one forward pass of one
thread; requests of other threads run the same modules unchanged.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedModel

from kvmem.cache import CompactedView, dynamic_cache, observing
from kvmem.models.structure import decoder_layers

MASK = "attention_mask"
"""The argument of a decoder layer that a model gives the mask in."""


@contextmanager
def with_masks(model: PreTrainedModel, cache: DynamicCache, new: int) -> Iterator[None]:
    """Inside the block, a forward pass of this thread over `new` tokens attends to a compacted memory as it is meant.

    Does nothing for any other cache, and for a compacted memory whose layers and heads have one length and no bias.
    """
    layers = dynamic_cache.layers_with_masks(cache)
    if not layers:
        yield
        return
    heads: int = model.config.get_text_config(decoder=True).num_attention_heads
    pairs = zip(decoder_layers(model), layers, strict=True)
    hooks = [module.register_forward_pre_hook(_masked(layer, new, heads), with_kwargs=True) for module, layer in pairs]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _masked(layer: CompactedView, new: int, heads: int) -> Any:
    """A hook that gives a decoder layer the mask of `layer`."""
    thread = threading.get_ident()

    @observing
    def give_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        # Another thread may have listed this hook before it was removed: torch then calls it without keywords.
        if threading.get_ident() != thread or kwargs is None:
            return None
        layer.has_mask = True
        mask = layer.mask(new, heads)
        names = list(inspect.signature(module.forward).parameters)
        if MASK in names and names.index(MASK) < len(args):
            at = names.index(MASK)
            return (*args[:at], mask, *args[at + 1 :]), kwargs
        return args, kwargs | {MASK: mask}

    return give_mask
