"""Compaction: a memory of fewer entries than tokens. Each strategy is one file. All are lossy.

A `CompactionStrategy` says which entries each layer and KV head keeps, or makes new ones. `strategy(name)` finds one by
name, in this package or in an installed distribution (entry point group `kvmem.compaction`). A strategy that keeps some
of the memory's own entries derives from `TokenChoice`. `compact` makes a compacted item of an item. Which models are
covered is measured on the model: `check_covered`.
"""

from kvmem.compaction.base import STRATEGIES, CompactionStrategy, Head, Memory, Repeat, strategy
from kvmem.compaction.compact import compact
from kvmem.compaction.coverage import check_covered
from kvmem.compaction.token_choice import TokenChoice

__all__ = [
    "STRATEGIES",
    "CompactionStrategy",
    "Head",
    "Memory",
    "Repeat",
    "TokenChoice",
    "check_covered",
    "compact",
    "strategy",
]
