"""Tiers for built memories: GPU, host memory, disk, a remote store, and quantized files on disk.

`TieredCache` maps item ids to items and keeps a byte budget for each tier. A `TierStore` holds the bytes of one tier.
`LoadTimes` measures every load, so that a tier is not used if prefilling is faster; `LoadEstimate` compares the two.
"""

from kvmem.tiers.base import DiskStore, MemoryStore, PendingDeletes, RefusedFile, TierStore
from kvmem.tiers.load_times import LoadEstimate, LoadTimes
from kvmem.tiers.quantized import BITS, QuantizedStore, check_hqq, quantized_bytes
from kvmem.tiers.remote import RemoteStore
from kvmem.tiers.tiered_cache import ORPHANS_AFTER_S, TieredCache

__all__ = [
    "BITS",
    "ORPHANS_AFTER_S",
    "DiskStore",
    "LoadEstimate",
    "LoadTimes",
    "MemoryStore",
    "PendingDeletes",
    "QuantizedStore",
    "RefusedFile",
    "RemoteStore",
    "TierStore",
    "TieredCache",
    "check_hqq",
    "quantized_bytes",
]
