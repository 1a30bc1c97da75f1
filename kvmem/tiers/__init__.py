"""Storage tiers for memories: GPU, host memory, disk, a remote store, and quantized forms.

`TieredCache` is a mapping of items to tiers with a byte budget for each. Loads are measured, so that a tier that is
slower than prefilling is not used.
"""

from kvmem.tiers.base import DiskStore
from kvmem.tiers.load_times import LoadEstimate, LoadTimes
from kvmem.tiers.quantized import BITS, check_hqq, quantized_bytes
from kvmem.tiers.tiered_cache import TieredCache

__all__ = ["BITS", "DiskStore", "LoadEstimate", "LoadTimes", "TieredCache", "check_hqq", "quantized_bytes"]
