"""From which length on a stored memory is worth its way, and what a fleet with shared memories needs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from experiments.performance_model.predictor import Engine, Layout, Prefill

LONGEST_TOKENS = 131_072


@dataclass(frozen=True)
class Tier:
    """Where a memory lies. `gb_s` None: on the GPU already."""

    name: str
    gb_s: float | None
    latency_s: float

    def fetch_s(self, layout: Layout, tokens: int) -> float:
        """Seconds for a memory of so many tokens, over one link, if nothing hides them."""
        moved = 0.0 if self.gb_s is None else tokens * layout.kv_bytes_a_token / (self.gb_s * 1e9)
        return self.latency_s + moved


def gain_s(layout: Layout, engine: Engine, tier: Tier, memory_tokens: int, query_tokens: int) -> float:
    """Seconds that loading saves over recomputing; negative: recomputing is faster."""
    direct = layout.ttft_s(Prefill(memory_tokens + query_tokens, 0), engine)
    injected = layout.ttft_s(Prefill(query_tokens, memory_tokens), engine)
    return direct - injected - tier.fetch_s(layout, memory_tokens)


def break_even_tokens(layout: Layout, engine: Engine, tier: Tier, query_tokens: int) -> int | None:
    """The shortest memory from which loading beats recomputing, up to 131,072 tokens; None: at no length.

    Bytes grow with the length, and recomputing faster: the gain turns positive once, and a halving search finds where.
    """
    if gain_s(layout, engine, tier, LONGEST_TOKENS, query_tokens) <= 0:
        return None
    low, high = 0, LONGEST_TOKENS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if gain_s(layout, engine, tier, middle, query_tokens) > 0 else (middle, high)
    return high


@dataclass(frozen=True)
class Fleet:
    """What answering `requests_per_s` takes; a replica is one layout that prefills one request at a time."""

    replicas_direct: int
    replicas_injected: int
    storage_tb: float
    network_gb_per_second: float
    """Of all replicas together, from the shared storage."""


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
    """`local_share` of the requests find their memory on the GPU, the others fetch it; a replica prefills for at most
    `busy_share` of the time (decoding comes on top, and is the same for both)."""
    direct = layout.ttft_s(Prefill(memory_tokens + query_tokens, 0), engine)
    injected = layout.ttft_s(Prefill(query_tokens, memory_tokens), engine)
    fetched = (1 - local_share) * requests_per_s
    per_memory = memory_tokens * layout.kv_bytes_a_token
    injected += (1 - local_share) * tier.fetch_s(layout, memory_tokens)
    return Fleet(
        replicas_direct=math.ceil(requests_per_s * direct / busy_share),
        replicas_injected=math.ceil(requests_per_s * injected / busy_share),
        storage_tb=memories * per_memory / 1e12,
        network_gb_per_second=fetched * per_memory / 1e9,
    )
