"""Tiny items that need no model, and how to dump, load and compare them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig, PreTrainedConfig

from kvmem import storage
from kvmem.cache.dynamic_cache import from_layers, layers_of, nbytes
from kvmem.cache.fingerprint import ModelFingerprint
from kvmem.cache.items import KVCacheItem, KVCacheMetadata, MemoryTokens, TextualSource

CPU = torch.device("cpu")
LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 8
_SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": KV_HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": 32,
}
CONFIG = LlamaConfig(**_SHAPE)
WINDOW = 4
SLIDING_CONFIG = MistralConfig(**_SHAPE, sliding_window=WINDOW)
FINGERPRINT = ModelFingerprint(
    architecture="LlamaForCausalLM",
    dtype="float32",
    layers=LAYERS,
    kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    rope={"rope_type": "default", "rope_theta": 10000.0},
    config="c0",
    weights="w0",
    tokenizer="t0",
    template="j0",
    origin="random weights of a test",
)


def item(
    name: str = "a",
    tokens: int = 6,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    fingerprint: ModelFingerprint | None = FINGERPRINT,
) -> KVCacheItem:
    """An item with the id `name` and random keys and values for `tokens` tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return torch.randn(1, KV_HEADS, tokens, HEAD_DIM, generator=generator).to(dtype)

    cache = from_layers([(draw(), draw()) for _ in range(LAYERS)], CONFIG)
    return KVCacheItem(cache, metadata(tokens, nbytes(cache), fingerprint), name)


def metadata(tokens: int, kv_bytes: int, fingerprint: ModelFingerprint | None = FINGERPRINT) -> KVCacheMetadata:
    """Metadata with every field set."""
    return KVCacheMetadata(
        tokens=MemoryTokens(
            source='The dial says "seven" – déjà vu.',
            template="plain",
            token_ids=tuple(range(tokens)),
            header_tokens=1,
            body_end=tokens,
            rest_ids=(30, 31),
        ),
        build_s=0.25,
        kv_bytes=kv_bytes,
        fingerprint=fingerprint,
        textual_memory=TextualSource(id="t1", metadata={"tags": ["dial"], "weight": 0.5, "note": None}),
    )


def load(
    path: Path, fingerprint: ModelFingerprint = FINGERPRINT, config: PreTrainedConfig = CONFIG
) -> list[KVCacheItem]:
    """The items of a file, in the format of its suffix, on the CPU."""
    return storage.for_filename(path.name).load(path, fingerprint, config, CPU)


def dump(path: Path, *items: KVCacheItem) -> Path:
    """Writes a file in the format of its suffix, and returns its path."""
    storage.for_filename(path.name).dump(path, items)
    return path


def same(ours: KVCacheItem, theirs: KVCacheItem) -> bool:
    """Whether tensors, to the bit, id, length and metadata are equal."""
    return (
        (ours.kv_cache_id, ours.metadata) == (theirs.kv_cache_id, theirs.metadata)
        and ours.kv_cache.get_seq_length() == theirs.kv_cache.get_seq_length()
        and same_tensors(ours.kv_cache, theirs.kv_cache)
    )


def same_tensors(ours: DynamicCache, theirs: DynamicCache) -> bool:
    """Whether all tensors are equal, to the bit, and of the same dtype and shape."""
    mine, yours = ([tensor for pair in layers_of(cache) for tensor in pair] for cache in (ours, theirs))
    return len(mine) == len(yours) and all(
        (a.dtype, a.shape) == (b.dtype, b.shape) and _raw(a).equal(_raw(b)) for a, b in zip(mine, yours, strict=True)
    )


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
