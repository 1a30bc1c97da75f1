"""The memory length from which loading is faster than recomputing, and the size of a fleet with shared memories."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

from experiments.performance_model.predictor import Engine, Layout, Prefill

MAX_TOKENS = 131_072


@dataclass(frozen=True)
class Tier:
    """A tier that stores memories. `gb_s` is its bandwidth; None for a memory that is on the GPU already."""

    name: str
    gb_s: float | None
    latency_s: float

    def fetch_s(self, layout: Layout, tokens: int) -> float:
        """Seconds of loading a memory of `tokens` tokens over one link, without overlap with computation."""
        moved = 0.0 if self.gb_s is None else layout.memory_bytes(tokens) / (self.gb_s * 1e9)
        return self.latency_s + moved


def gain_s(layout: Layout, engine: Engine, tier: Tier, memory_tokens: int, query_tokens: int) -> float:
    """The seconds that loading saves over recomputing. Negative if recomputing is faster."""
    direct = layout.ttft_s(Prefill(memory_tokens + query_tokens, 0), engine)
    injected = layout.ttft_s(Prefill(query_tokens, memory_tokens), engine)
    return direct - injected - tier.fetch_s(layout, memory_tokens)


def break_even_tokens(layout: Layout, engine: Engine, tier: Tier, query_tokens: int) -> int | None:
    """The shortest memory for which loading is faster than recomputing; None if there is none up to 131,072 tokens.

    The time of loading is linear in the length, and that of recomputing grows faster. So the gain changes its sign
    once, and a binary search finds where.
    """
    lengths = range(1, MAX_TOKENS + 1)
    found = bisect.bisect(lengths, 0.0, key=lambda tokens: gain_s(layout, engine, tier, tokens, query_tokens))
    return lengths[found] if found < len(lengths) else None


@dataclass(frozen=True)
class Fleet:
    """The size of a fleet. A replica is one layout that prefills one request at a time."""

    replicas_direct: int
    replicas_injected: int
    storage_tb: float
    network_gb_per_second: float
    """From the shared storage to all replicas together."""


def size_fleet(
    layout: Layout,
    engine: Engine,
    tier: Tier,
    *,
    requests_per_s: float,
    memories: int,
    memory_tokens: int,
    query_tokens: int,
    local_share: float,
    busy_share: float = 0.7,
) -> Fleet:
    """The fleet that answers `requests_per_s` requests.

    local_share: the share of requests whose memory is on the GPU. The others fetch it from `tier`.
    busy_share: the largest share of time that a replica prefills. Decoding is the same for both arms, and not counted.
    """
    direct = layout.ttft_s(Prefill(memory_tokens + query_tokens, 0), engine)
    injected = layout.ttft_s(Prefill(query_tokens, memory_tokens), engine)
    fetched = (1 - local_share) * requests_per_s
    per_memory = layout.memory_bytes(memory_tokens)
    injected += (1 - local_share) * tier.fetch_s(layout, memory_tokens)
    return Fleet(
        replicas_direct=math.ceil(requests_per_s * direct / busy_share),
        replicas_injected=math.ceil(requests_per_s * injected / busy_share),
        storage_tb=memories * per_memory / 1e12,
        network_gb_per_second=fetched * per_memory / 1e9,
    )
