"""Merging several memories into one cache: one strategy in each file.

Each strategy is a `MergeStrategy` that says whether it is exact. `Reprefill`, the default, is. `strategy(name)` finds
one by its name, here or in an installed package (entry point group `kvmem.merge`).
"""

from kvmem.merge.base import STRATEGIES, MergeStrategy, joined_tokens, merged_tokens, strategy
from kvmem.merge.rope import FIXED_FREQUENCIES, HALF_ROTATION

__all__ = [
    "FIXED_FREQUENCIES",
    "HALF_ROTATION",
    "STRATEGIES",
    "MergeStrategy",
    "joined_tokens",
    "merged_tokens",
    "strategy",
]
