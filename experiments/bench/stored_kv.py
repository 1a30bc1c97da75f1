"""Whether a stored memory's keys and values are those of the independent forward pass on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from experiments.bench.bench import Bench
from experiments.measurement import NOISE_MULTIPLE, Layers
from kvmem.cache import KVCacheItem, dynamic_cache

MOST_UNITS = {torch.float32: 2000.0, torch.bfloat16: 40.0, torch.float16: 100.0}
"""The noise of a token's KV counts as at most so many units in the last place, relative to the token's norm."""


def kv_check(bench: Bench, items: Sequence[KVCacheItem]) -> tuple[float | None, float | None]:
    """The largest distance of a token's stored KV from the reference's, and what rounding explains of it.

    A distance is relative: the norm of the difference of a token's keys (or values) over all heads of a layer, over the
    reference's norm. (None, None) for items without tensors here, or whose loss is stated.
    """
    checked = [pair for item in items if (pair := _of_item(bench, item)) is not None]
    return max(checked, key=lambda pair: pair[0] / pair[1]) if checked else (None, None)


def _of_item(bench: Bench, item: KVCacheItem) -> tuple[float, float] | None:
    known = bench.kv_checks.get(item.kv_cache_id)
    if known is None and not item.metadata.lossy:
        stored = [(keys[0], values[0]) for keys, values in dynamic_cache.layers_of(item.kv_cache)]
        runs = bench.reference.keys_values(item.metadata.tokens.token_ids) if stored else ()
        if not runs or any(a[0].shape != b[0].shape for a, b in zip(stored, runs[0], strict=True)):
            return None
        unit = torch.finfo(bench.backend.dtype).eps
        noise = max(distance(other, runs[0]) for other in runs[1:])
        allowed = NOISE_MULTIPLE * min(max(noise, unit), MOST_UNITS[bench.backend.dtype] * unit)
        known = bench.kv_checks[item.kv_cache_id] = (distance(stored, runs[0]), allowed)
    return known


def distance(layers: Layers, reference: Layers) -> float:
    """The largest relative distance of a token's keys or values, (heads, tokens, head_dim) in each layer."""
    return max(
        float(((mine - theirs).norm(dim=(0, 2)) / theirs.norm(dim=(0, 2)).clamp_min(1e-12)).max())
        for layer, other in zip(layers, reference, strict=True)
        for mine, theirs in ((a.float(), b.float()) for a, b in zip(layer, other, strict=True))
    )
