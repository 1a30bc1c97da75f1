"""How long loads from a tier take: measured at every load, so that one that does not pay is not done."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

import numpy as np

KEPT = 9
"""Loads of a tier that count: the last ones, for links and caches change."""
APART = 1.25
"""Two loads tell the seconds of a byte where the one is so many times as large as the other, or larger."""


@dataclass(frozen=True)
class LoadEstimate:
    """What bringing an item to the model would take, and what prefilling the tokens that a prompt shares with it."""

    tier: str
    nbytes: int
    load_s: float
    tokens: int
    prefill_s: float

    @property
    def pays(self) -> bool:
        return self.saved_s > 0

    @property
    def saved_s(self) -> float:
        """Below 0: prefilling is sooner done."""
        return self.prefill_s - self.load_s

    def __str__(self) -> str:
        return (
            f"loading its {self.nbytes / 1e6:.3g} MB from {self.tier} takes about {self.load_s:.3f} s, and prefilling "
            f"its {self.tokens} tokens {self.prefill_s:.3f} s"
        )


class LoadTimes:
    """Seconds of real loads by tier, and from them what a load of so many bytes will take. Thread-safe.

    A straight line through the last loads, fixed seconds + seconds a byte, whose slope is the median of the slopes
    between all pairs of them (Theil 1950, Sen 1968): a quarter of the loads may be outliers and hardly move it. Where
    all are of much the same size, the median seconds a byte.
    """

    def __init__(self) -> None:
        self._loads: dict[str, deque[tuple[int, float]]] = {}
        self._lock = threading.Lock()

    def record(self, tier: str, nbytes: int, seconds: float) -> None:
        """One load of `nbytes` of keys and values, from when they were wanted to when the model could use them."""
        with self._lock:
            self._loads.setdefault(tier, deque(maxlen=KEPT)).append((nbytes, seconds))

    def count(self, tier: str) -> int:
        """How many loads an estimate rests on."""
        with self._lock:
            return len(self._loads.get(tier, ()))

    def expected_s(self, tier: str, nbytes: int) -> float | None:
        """Seconds of the next load of `nbytes`; None where none was measured.

        >>> times = LoadTimes()
        >>> for nbytes, seconds in ((100, 1.1), (200, 1.2), (300, 1.3), (400, 9.0), (500, 1.5)):
        ...     times.record("cold", nbytes, seconds)
        >>> round(times.expected_s("cold", 1000), 3)
        2.0
        """
        with self._lock:
            loads = list(self._loads.get(tier, ()))
        if not loads:
            return None
        sizes, seconds = np.array(loads, dtype=float).T
        first, second = np.triu_indices(len(loads), 1)
        small, large = np.minimum(sizes[first], sizes[second]), np.maximum(sizes[first], sizes[second])
        told = large >= APART * small
        if not told.any():
            return float(np.median(seconds / sizes)) * nbytes
        slopes = (seconds[first] - seconds[second])[told] / (sizes[first] - sizes[second])[told]
        byte_s = max(0.0, float(np.median(slopes)))
        return max(0.0, float(np.median(seconds - byte_s * sizes))) + byte_s * nbytes
