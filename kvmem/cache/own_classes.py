"""Cache classes of models that accept no other class. What their layers keep is in `layers`, as for every model.

transformers' MiniMax keeps the states of its linear attention in a list beside the cache's layers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig

from kvmem.cache.layers import RECURRENT, set_states


def class_for(config: PreTrainedConfig, kind: type[DynamicCache]) -> type[DynamicCache]:
    """`kind`, or a subclass of it that the model of `config` accepts."""
    if config.model_type != "minimax":
        return kind
    if kind not in _minimax:
        _minimax[kind] = _made(kind)
    return _minimax[kind]


_minimax: dict[type[DynamicCache], type[DynamicCache]] = {}


def _made(kind: type[DynamicCache]) -> type[DynamicCache]:
    from transformers.models.minimax.modeling_minimax import MiniMaxCache  # slow to import, and few need it

    class StatesInLayers(MiniMaxCache):
        """Keeps the states of linear attention in the cache's layers."""

        def __init__(self, config: PreTrainedConfig) -> None:
            DynamicCache.__init__(self, config=config)
            self.linear_cache = []

        def __len__(self) -> int:
            return len(self.layers)

        def set_linear_cache(self, layer_idx: int, linear_cache: torch.Tensor) -> None:
            set_states(self.layers[layer_idx], {f"{RECURRENT}.0": linear_cache})

        def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
            layer: Any = self.layers[layer_idx]
            state: torch.Tensor | None = layer.recurrent_states[0]
            return state

    bases = (StatesInLayers,) if kind is DynamicCache else (kind, StatesInLayers)
    return type(f"MiniMax{kind.__name__}", bases, {})
