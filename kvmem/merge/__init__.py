"""Merging several memories into one cache. Each strategy is one file.

A `MergeStrategy` builds the cache for the token ids that `merged_tokens` returns, and declares whether it is exact.
`strategy(name)` finds one by name, in this package or in an installed distribution (entry point group `kvmem.merge`).
`Reprefill`, the default, is exact. A strategy that concatenates stored blocks derives from `ConcatStrategy`. Which
models such strategies cover is measured on the model: `proof_of`.
"""

from kvmem.merge.base import STRATEGIES, MergeStrategy, joined_tokens, merged_tokens, strategy
from kvmem.merge.concat import ConcatenatedBlocks, ConcatStrategy
from kvmem.merge.proof import Proof, Unproven, proof_of
from kvmem.merge.recompute import recompute

__all__ = [
    "STRATEGIES",
    "ConcatStrategy",
    "ConcatenatedBlocks",
    "MergeStrategy",
    "Proof",
    "Unproven",
    "joined_tokens",
    "merged_tokens",
    "proof_of",
    "recompute",
    "strategy",
]
