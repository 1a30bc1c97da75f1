"""What a scheduler reports of itself: each memory, and figures by tier."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryInfo:
    """One memory or group, as `MemScheduler.list` returns it."""

    id: str
    namespace: str
    members: tuple[str, ...]
    """The memories of a group, in order; of a memory, only itself."""
    tier: str | None
    """Where its KV is; None: it is kept as text."""
    tokens: int
    nbytes: int
    """Bytes of its KV in that tier; 0 without KV."""
    uses: int
    edits: int
    is_pinned: bool
    expires_in_s: float | None
    """None: it has no end."""
    lossy: str
    """The form to which its KV had been quantized ("int8"); "" if it is as built."""


@dataclass(frozen=True)
class TierStats:
    """One tier."""

    budget_bytes: int
    used_bytes: int
    memories: int
    hits: int
    """Answers with KV from this tier."""
    loads: int
    """Loads that were measured: those of disk and cold tiers."""
    load_s: float
    """Their seconds together."""
    writes: int
    write_s: float


@dataclass(frozen=True)
class SchedulerStats:
    """Counts since the scheduler was opened, as `MemScheduler.stats` returns them."""

    hits: int
    """Answers that used stored KV."""
    misses: int
    cached_tokens: int
    """Tokens of prompts that came from stored KV."""
    computed_tokens: int
    """Tokens of prompts that were prefilled."""
    prefill_s: float
    """Seconds of the prefills of answers."""
    builds: int
    build_s: float
    admissions: int
    """KV of misses that was kept."""
    promotions: int
    demotions: int
    evictions: int
    expirations: int
    refusals: int
    """Builds, admissions and moves that failed."""
    cancelled_builds: int
    not_worth_loading: int
    """How often stored KV was not loaded because prefilling is faster."""
    tiers: Mapping[str, TierStats]
    """By name, fastest first."""

    @property
    def hit_rate(self) -> float:
        """The share of answers that used stored KV; 0 before the first answer."""
        return self.hits / max(1, self.hits + self.misses)


class AnswerCounts:
    """Counts the prefills of answers. Thread-safe."""

    def __init__(self) -> None:
        self.hits: Counter[str] = Counter()
        """By tier."""
        self.misses = self.cached_tokens = self.computed_tokens = 0
        self.prefill_s = 0.0
        self._lock = threading.Lock()

    def add(self, tier: str, computed: int, cached: int, seconds: float) -> None:
        """An answer's prefill computed so many tokens behind so many cached ones, which came from `tier`."""
        with self._lock:
            if cached:
                self.hits[tier] += 1
            else:
                self.misses += 1
            self.cached_tokens += cached
            self.computed_tokens += computed
            self.prefill_s += seconds
