"""Whether a stored memory's keys and values are those of the independent forward pass, and what an answer is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from experiments.bench.bench import Bench
from experiments.bench.kv_distance import Distance, KVCheck
from experiments.measurement import NOISE_MULTIPLE, Layers, comparable
from kvmem.cache import CacheView, KVCacheItem

MOST_UNITS = {torch.float32: 2000.0, torch.bfloat16: 40.0, torch.float16: 100.0}
"""The noise of a token's KV counts as at most so many units in the last place, relative to the token's norm."""
SCALE_UNITS = 0.25
"""The rounding errors of a layer's many numbers cancel in its scale, so that it is known to a part of one unit."""


def kv_check(bench: Bench, items: Sequence[KVCacheItem]) -> KVCheck | None:
    """The worst of each distance. None for items without tensors here, or whose loss is stated."""
    checked = [found for item in items if (found := _of_item(bench, item)) is not None]
    if not checked:
        return None
    return KVCheck(_worst([found.token for found in checked]), _worst([found.scale for found in checked]))


def view_check(bench: Bench, items: Sequence[KVCacheItem]) -> float | None:
    """The largest difference of a number between a memory and the view that an answer is given: 0 if it is a copy.

    None if the engine has no tensors here, or merges several memories.
    """
    if len(items) != 1:
        return None
    view = bench.backend.view(items, bench.setup.merge, bench.setup.separator)
    return view_off(items[0], view) if isinstance(view, CacheView) else None


def view_off(item: KVCacheItem, view: CacheView) -> float | None:
    """The largest difference of a number between a memory and a view of it; None if it has no tensors here."""
    stored = comparable(item.kv_cache)
    if not stored:
        return None
    given = [
        tuple(tensor.to(held.device) for tensor, held in zip(layer, other, strict=True))
        for layer, other in zip(comparable(view), stored, strict=True)
    ]
    return max(
        float((mine - theirs).abs().max()) if mine.shape == theirs.shape else float("inf")
        for mine, theirs in _pairs(stored, given)
    )


def _worst(distances: Sequence[Distance]) -> Distance:
    return max(distances, key=lambda one: one.off / one.allowed)


def _of_item(bench: Bench, item: KVCacheItem) -> KVCheck | None:
    known = bench.kv_checks.get(item.kv_cache_id)
    if known is None and not item.metadata.lossy:
        stored = comparable(item.kv_cache)
        runs = bench.reference.keys_values(item.metadata.tokens.token_ids) if stored else ()
        if not runs or _shapes(stored) != _shapes(runs[0]):
            return None
        unit = torch.finfo(bench.backend.dtype).eps
        noise = max(distance(other, runs[0]) for other in runs[1:])
        scale_noise = max(scale_off(other, runs[0]) for other in runs[1:])
        known = bench.kv_checks[item.kv_cache_id] = KVCheck(
            Distance(
                distance(stored, runs[0]),
                NOISE_MULTIPLE * min(max(noise, unit), MOST_UNITS[bench.backend.dtype] * unit),
            ),
            Distance(scale_off(stored, runs[0]), max(NOISE_MULTIPLE * min(scale_noise, unit), SCALE_UNITS * unit)),
        )
    return known


def _shapes(layers: Layers) -> list[list[torch.Size]]:
    return [[tensor.shape for tensor in layer] for layer in layers]


def distance(layers: Layers, reference: Layers) -> float:
    """The largest relative distance of a token's keys or values, or of a state, (heads, tokens, size) in each layer."""
    return max(
        float(((mine - theirs).norm(dim=(0, 2)) / theirs.norm(dim=(0, 2)).clamp_min(1e-12)).max())
        for mine, theirs in _pairs(layers, reference)
    )


def scale_off(layers: Layers, reference: Layers) -> float:
    """How far from 1 the factor is that fits the reference's keys or values best to those of a layer."""
    return max(
        abs(float((mine.double() * theirs).sum() / theirs.double().square().sum().clamp_min(1e-12)) - 1)
        for mine, theirs in _pairs(layers, reference)
    )


def _pairs(layers: Layers, reference: Layers) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Keys, then values of each layer in fp32, one layer at a time: all of them at once may not fit a GPU."""
    for layer, other in zip(layers, reference, strict=True):
        for mine, theirs in zip(layer, other, strict=True):
            yield mine.float(), theirs.float()
