"""How long loads from a tier take, measured at every load, so that a load slower than a prefill can be skipped."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

WINDOW = 9
"""How many of the last loads of a tier an estimate uses, because links and caches change."""
MIN_SIZE_RATIO = 1.25
"""Two loads give a slope only if the larger one has at least so many times the bytes of the smaller one."""


@dataclass(frozen=True)
class LoadEstimate:
    """The expected time of loading an item, and of prefilling the tokens that a prompt shares with it instead."""

    tier: str
    nbytes: int
    load_s: float
    tokens: int
    prefill_s: float

    @property
    def pays(self) -> bool:
        """Whether loading is faster than prefilling."""
        return self.saved_s > 0

    @property
    def saved_s(self) -> float:
        """Seconds saved by loading; negative if prefilling is faster."""
        return self.prefill_s - self.load_s

    def __str__(self) -> str:
        return (
            f"loading its {self.nbytes / 1e6:.3g} MB from {self.tier} takes about {self.load_s:.3f} s, and prefilling "
            f"its {self.tokens} tokens {self.prefill_s:.3f} s"
        )


class LoadTimes:
    """Measures the loads of each tier and predicts the time of the next one from its bytes. Thread-safe.

    The prediction is a line through the last loads, fixed seconds + seconds per byte. Its slope is the median of the
    slopes between all pairs of loads (Theil 1950, Sen 1968), so a quarter of the loads may be outliers. If all loads
    have about the same size, the prediction uses the median of the seconds per byte.
    """

    def __init__(self) -> None:
        self._loads: dict[str, deque[tuple[int, float]]] = {}
        self._totals: dict[str, tuple[int, float]] = {}
        self._lock = threading.Lock()

    def record(self, tier: str, nbytes: int, seconds: float) -> None:
        """Records one load of `nbytes` of keys and values, in seconds from the request until the model can use them."""
        with self._lock:
            self._loads.setdefault(tier, deque(maxlen=WINDOW)).append((nbytes, seconds))
            count, total_s = self._totals.get(tier, (0, 0.0))
            self._totals[tier] = count + 1, total_s + seconds

    def total(self, tier: str) -> tuple[int, float]:
        """How many loads from the tier this process measured, and their seconds together."""
        with self._lock:
            return self._totals.get(tier, (0, 0.0))

    def count(self, tier: str) -> int:
        """How many loads an estimate for the tier is based on."""
        with self._lock:
            return len(self._loads.get(tier, ()))

    def state(self) -> dict[str, list[tuple[int, float]]]:
        """By tier, (bytes, seconds) of the loads that estimates are based on, as plain values for a file."""
        with self._lock:
            return {tier: list(loads) for tier, loads in self._loads.items()}

    def restore(self, state: Mapping[str, Sequence[tuple[int, float]]]) -> None:
        """Takes over the loads that an earlier process measured."""
        with self._lock:
            for tier, loads in state.items():
                self._loads.setdefault(tier, deque(maxlen=WINDOW)).extend(loads)

    def expected_s(self, tier: str, nbytes: int) -> float | None:
        """Predicted seconds of a load of `nbytes`; None if no load from the tier was measured.

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
        differ = large >= MIN_SIZE_RATIO * small
        if not differ.any():
            return float(np.median(seconds / sizes)) * nbytes
        slopes = (seconds[first] - seconds[second])[differ] / (sizes[first] - sizes[second])[differ]
        s_per_byte = max(0.0, float(np.median(slopes)))
        return max(0.0, float(np.median(seconds - s_per_byte * sizes))) + s_per_byte * nbytes
