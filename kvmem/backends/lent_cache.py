"""A lent cache that comes back with a query: this engine's model's, or refused before anything is computed."""

from __future__ import annotations

from kvmem import dynamic_cache
from kvmem.dynamic_cache import LentCache
from kvmem.errors import FingerprintError, check_kind
from kvmem.fingerprint import ModelFingerprint


def check_lent(cache: LentCache, fingerprint: ModelFingerprint, shards: int = 1) -> None:
    """Raises ArgumentError for what is no lent cache, FingerprintError for one of another model than `fingerprint`'s.

    A cache that does not say whose it is is told by its tensors' shape; `shards` processes share its heads.
    """
    check_kind("A lent cache", cache, LentCache, way_out="KVCacheMemory.get_cache lends one for ids.")
    theirs = cache.fingerprint
    if theirs is fingerprint:
        return
    if theirs is not None:
        difference = fingerprint.difference(theirs)
    elif cache.get_seq_length():
        difference = fingerprint.shape_difference(dynamic_cache.layers_of(cache), shards)
    else:  # nothing is held yet: all of the prompt is computed
        return
    if difference:
        raise FingerprintError(
            f"This cache was lent by another model: {difference}. Answer with that model's backend, or extract the "
            "memory again with this one."
        )
