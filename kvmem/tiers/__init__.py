"""Storage tiers for memories: GPU, host memory, disk, a remote store, and quantized forms.

`TieredItems` is a mapping of items to tiers with a byte budget for each. Loads are measured, so that a tier that is
slower than prefilling is not used.
"""

from kvmem.tiers.base import DiskStore
from kvmem.tiers.load_times import Load
from kvmem.tiers.quantized import BITS, check_available, compressed_bytes
from kvmem.tiers.tiered_cache import TieredItems

__all__ = ["BITS", "DiskStore", "Load", "TieredItems", "check_available", "compressed_bytes"]
