"""Counts the tokens that pass through a model's matrix products, by torch's own interception of its functions.

For engines that run a model's weights without calling its modules, so that no hook sees their tokens. An arm that
leaves out tokens or layers multiplies fewer rows than it owes.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class ProductWitness(TorchFunctionMode):
    """Inside the block, `tokens` counts the rows that are multiplied by the weights of each decoder layer.

    A layer's weights have several products with the same rows: the largest count of one weight is the layer's, and the
    smallest of all layers is that of the model. It slows every operation down, so no call is timed meanwhile.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        layers = max(lists, key=len, default=nn.ModuleList())
        self._layer_of = {
            weight.data_ptr(): number
            for number, layer in enumerate(layers)
            for weight in layer.parameters()
            if weight.dim() == 2
        }
        self._layers = len(layers)
        self._rows: Counter[int] = Counter()

    @property
    def tokens(self) -> int:
        of_layer = [0] * self._layers
        for pointer, rows in self._rows.items():
            number = self._layer_of[pointer]
            of_layer[number] = max(of_layer[number], rows)
        return min(of_layer, default=0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [given for given in args if isinstance(given, torch.Tensor)]
        for rows_tensor, weight in pairwise(tensors):
            # addmm has its bias first, then the rows and the weight, which is a view of the parameter
            if weight.dim() == 2 and rows_tensor.dim() >= 2 and weight.data_ptr() in self._layer_of:
                self._rows[weight.data_ptr()] += rows_tensor.numel() // rows_tensor.shape[-1]
        return func(*args, **(kwargs or {}))
