"""Joins the files that the ranks of a tensor-parallel engine write, each of its own heads. Does not import vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from kvmem.cache import KV, KVCacheItem, ModelFingerprint, dynamic_cache
from kvmem.engines.vllm.connector.protocol import part_name
from kvmem.errors import StorageError
from kvmem.storage import SafetensorsFile

CPU = torch.device("cpu")


def join_parts(folder: Path, name: str, fingerprint: ModelFingerprint, config: PreTrainedConfig, ranks: int) -> None:
    """Makes one file of those that the ranks of a tensor-parallel engine have saved as `name`, each of its heads.

    Raises StorageError or FingerprintError if one is incomplete or was written by another model.
    """
    SafetensorsFile().dump(folder / name, [_joined(folder, name, fingerprint, config, ranks)])


def _joined(
    folder: Path, name: str, fingerprint: ModelFingerprint, config: PreTrainedConfig, ranks: int
) -> KVCacheItem:
    paths = [folder / part_name(name, rank, ranks) for rank in range(ranks)]
    parts = [SafetensorsFile().load(path, fingerprint, config, CPU)[0] for path in paths]
    layers = [
        _heads_of(pairs, fingerprint.stored_kv_heads)
        for pairs in zip(*(dynamic_cache.layers_of(part.kv_cache) for part in parts), strict=True)
    ]
    for path in paths:
        path.unlink()
    return KVCacheItem(dynamic_cache.from_layers(layers, config), parts[0].metadata, parts[0].kv_cache_id)


def _heads_of(parts: Sequence[KV], kv_heads: int) -> KV:
    """The keys and values of one layer with all heads. If there are more ranks than heads, neighbors hold the same."""
    ranks_per_head = max(len(parts) // kv_heads, 1)
    kept = parts[::ranks_per_head]
    keys, values = torch.cat([keys for keys, _ in kept], dim=1), torch.cat([values for _, values in kept], dim=1)
    if keys.shape[1] != kv_heads:
        raise StorageError(f"The ranks saved {keys.shape[1]} heads, and the model has {kv_heads}. Extract again.")
    return keys, values
