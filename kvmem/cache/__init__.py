"""KV caches and the model that they are valid for.

A `KVCacheItem` is one memory as keys and values, with its token ids and metadata. A `ModelFingerprint` identifies the
model that computed them. A `CacheView` is a copy-on-write view of stored items: an engine extends it with a query, and
the stored tensors stay as they are.

What a layer keeps is told by `CacheLayout`: an entry for each token (keys and values), or a state at the memory's end.
A compacted memory has fewer entries than tokens: `Compaction` says how many, and `compacted_layers` how they are kept.

Two modules are used as namespaces. `dynamic_cache` builds, views, crops and joins transformers' `DynamicCache`; it,
`compacted_layers` and `layers` are the only modules that know its internals. `device_transfer` copies a cache from host
memory to a GPU while the model already computes.
"""

from kvmem.cache import device_transfer, dynamic_cache
from kvmem.cache.compacted_layers import BIAS, PACKED_KEYS, PACKED_VALUES, CompactedView, packed
from kvmem.cache.dynamic_cache import CacheView, KeptPrefix
from kvmem.cache.fingerprint import ModelFingerprint, fingerprint_of, hash_template, hash_tokenizer, sha256
from kvmem.cache.finite import layer_that_is_not_finite
from kvmem.cache.items import (
    Compaction,
    DialogueMemoryItem,
    KVCacheItem,
    KVCacheMetadata,
    MemoryTokens,
    Message,
    Source,
    TextualMemoryItem,
    TextualSource,
)
from kvmem.cache.layers import CONV, ENTRIES, INDEXER, KEYS, KV, RECURRENT, VALUES, Contents, LayersComputed
from kvmem.cache.layout import CacheLayout, KeptTensor, TensorLayout
from kvmem.cache.mapped_files import MappedFile
from kvmem.cache.model_function import FunctionWatch, foreign_code, observing
from kvmem.cache.model_state import ModelWatch, underlying
from kvmem.cache.plain_values import text_fault, value_fault

__all__ = [
    "BIAS",
    "CONV",
    "ENTRIES",
    "INDEXER",
    "KEYS",
    "KV",
    "PACKED_KEYS",
    "PACKED_VALUES",
    "RECURRENT",
    "VALUES",
    "CacheLayout",
    "CacheView",
    "CompactedView",
    "Compaction",
    "Contents",
    "DialogueMemoryItem",
    "FunctionWatch",
    "KVCacheItem",
    "KVCacheMetadata",
    "KeptPrefix",
    "KeptTensor",
    "LayersComputed",
    "MappedFile",
    "MemoryTokens",
    "Message",
    "ModelFingerprint",
    "ModelWatch",
    "Source",
    "TensorLayout",
    "TextualMemoryItem",
    "TextualSource",
    "device_transfer",
    "dynamic_cache",
    "fingerprint_of",
    "foreign_code",
    "hash_template",
    "hash_tokenizer",
    "layer_that_is_not_finite",
    "observing",
    "packed",
    "sha256",
    "text_fault",
    "underlying",
    "value_fault",
]
