"""Text memories as precomputed KV caches, injected into a language model."""

from kvmem.cache import DialogueMemoryItem, KVCacheItem, TextualMemoryItem
from kvmem.config import KVCacheMemoryConfig
from kvmem.errors import KVMemError
from kvmem.memory import KVCacheMemory
from kvmem.scheduler import MemScheduler

__version__ = "0.2.0"

__all__ = [
    "DialogueMemoryItem",
    "KVCacheItem",
    "KVCacheMemory",
    "KVCacheMemoryConfig",
    "KVMemError",
    "MemScheduler",
    "TextualMemoryItem",
    "__version__",
]
