"""Keys and values that are not those of the memory, in storage or in the view that an answer is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kvmem.cache import dynamic_cache
from kvmem.engines.huggingface import HFBackend
from tests.mutations.mutation import Mutation, Patch

KIND = "wrong KV"
Edit = Callable[[list[tuple[torch.Tensor, torch.Tensor]]], None]
STORED = "stored KV of a|a logit is|a logit of the timed"


def stored(edit: Edit, by: str = "build_tokens") -> Patch:
    """`edit` changes the layers of every item that is made `by` this method: (1, heads, tokens, head_dim) each."""

    def make(original: Any) -> Any:
        def make_item(backend: Any, *given: Any, **named: Any) -> Any:
            item = original(backend, *given, **named)
            with torch.inference_mode():
                edit(dynamic_cache.layers_of(item.kv_cache))
            return item

        return make_item

    return Patch(HFBackend, by, make)


def viewed(edit: Callable[[Any], None]) -> Patch:
    """`edit` changes each layer of every view; the stored tensors stay."""

    def make(original: Any) -> Any:
        def view(backend: Any, *given: Any) -> Any:
            cache = original(backend, *given)
            with torch.inference_mode():
                for layer in cache.layers:
                    edit(layer)
            return cache

        return view

    return Patch(HFBackend, "view", make)


def keys_rolled(layers: Any) -> None:
    for keys, _ in layers:
        keys.copy_(keys.roll(1, dims=2))


def last_is_its_neighbour(layers: Any) -> None:
    for pair in layers:
        for tensor in pair:
            tensor[:, :, -1] = tensor[:, :, -2].clone()


def one_is_another(layers: Any) -> None:
    for pair in layers:
        for tensor in pair:
            tensor[:, :, 40] = tensor[:, :, 41].clone()


def values_scaled(layers: Any) -> None:
    for _, values in layers:
        values.mul_(1.01)


def keys_of_one_layer_scaled(layers: Any) -> None:
    layers[-1][0].mul_(1.01)


def layers_swapped(layers: Any) -> None:
    for mine, other in zip(layers[0], layers[1], strict=True):
        kept = mine.clone()
        mine.copy_(other)
        other.copy_(kept)


def heads_swapped(layers: Any) -> None:
    for keys, _ in layers:
        keys.copy_(keys.flip(1))


def one_value_zero(layers: Any) -> None:
    layers[-1][1][:, :, 7] = 0


def noise_in_values(layers: Any) -> None:
    for _, values in layers:
        values.add_(0.01 * values.std() * torch.randn_like(values))


def kept_in_bfloat16(layers: Any) -> None:
    for pair in layers:
        for tensor in pair:
            tensor.copy_(tensor.bfloat16())


def view_values_scaled(layer: Any) -> None:
    layer.values = layer.values * 1.01


def view_last_key_zero(layer: Any) -> None:
    layer.keys = torch.cat((layer.keys[:, :, :-1], 0 * layer.keys[:, :, -1:]), dim=2)


def view_keys_rolled(layer: Any) -> None:
    layer.keys = layer.keys.roll(1, dims=2)


MUTATIONS = [
    *(
        Mutation(KIND, f"stored: {edit.__name__.replace('_', ' ')}", STORED, (stored(edit),))
        for edit in (
            keys_rolled,
            last_is_its_neighbour,
            one_is_another,
            values_scaled,
            keys_of_one_layer_scaled,
            layers_swapped,
            heads_swapped,
            one_value_zero,
            noise_in_values,
            kept_in_bfloat16,
        )
    ),
    *(
        Mutation(KIND, f"in the {edit.__name__.replace('_', ' ')}", "view that an answer is given", (viewed(edit),))
        for edit in (view_values_scaled, view_last_key_zero, view_keys_rolled)
    ),
]
