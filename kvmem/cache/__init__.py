"""Stored caches and the model that they are valid for.

A `KVCacheItem` holds the keys and values of a text with its metadata. `dynamic_cache` is the only module that knows the
inside of transformers' `DynamicCache`: it builds caches, and gives out copy-on-write views (`CacheView`) of stored
ones. `ModelFingerprint` says which model computed a cache.
"""

from kvmem.cache.dynamic_cache import CacheView
from kvmem.cache.fingerprint import ModelFingerprint, fingerprint_of, hash_tokenizer, sha256
from kvmem.cache.items import (
    KVCacheItem,
    KVCacheMetadata,
    MemoryTokens,
    Message,
    Source,
    TextualMemoryItem,
    TextualSource,
)
from kvmem.cache.layers import KV

__all__ = [
    "KV",
    "CacheView",
    "KVCacheItem",
    "KVCacheMetadata",
    "MemoryTokens",
    "Message",
    "ModelFingerprint",
    "Source",
    "TextualMemoryItem",
    "TextualSource",
    "fingerprint_of",
    "hash_tokenizer",
    "sha256",
]
