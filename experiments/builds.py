"""The items of a run: each source is built once, after a build that warms up; a dialogue extends its earlier turns."""

from __future__ import annotations

from experiments.bench import Bench
from kvmem.items import KVCacheItem, Source


def built_once(bench: Bench, source: Source) -> KVCacheItem:
    """The item of `source`, built now if it was not before."""
    for item in bench.built:
        if item.metadata.tokens.source == source:
            return item
    base = next((item for item in reversed(bench.built) if _goes_on(item.metadata.tokens.source, source)), None)
    turns = source if base is None else source[len(base.metadata.tokens.source) :]
    bench.memory.extract(turns, base=base)  # warms up this shape
    bench.built.append(bench.memory.extract(turns, base=base))
    return bench.built[-1]


def build_s(bench: Bench, item: KVCacheItem) -> float:
    """Seconds that the item took in all: an extended one stands on those built before it."""
    source = item.metadata.tokens.source
    return item.metadata.build_s + sum(
        built.metadata.build_s for built in bench.built if _goes_on(built.metadata.tokens.source, source)
    )


def _goes_on(earlier: Source, source: Source) -> bool:
    """True where `source` is a dialogue that `earlier` begins."""
    if isinstance(earlier, str) or isinstance(source, str):
        return False
    return len(earlier) < len(source) and source[: len(earlier)] == earlier
