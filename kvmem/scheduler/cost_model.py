"""What prefilling and loading cost on this machine: measured, so that a benefit is in seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvmem.engines import Backend
from kvmem.errors import ConfigError
from kvmem.tiers import LoadEstimate, LoadTimes

Number = Any
"""int, float, or a numpy array of them."""

CALIBRATION_TOKENS = (32, 128, 384, 1024)
FIT_ROUNDS = 20
LEAST_SHARE = 0.05
"""A sample is fitted with no less than this share of its seconds while weights are sought."""


@dataclass(frozen=True)
class Costs:
    """Seconds of a prefill: `base_s` + `token_s` a new token + `pair_s` a pair of a new token and one that it sees.

    `load_s_a_byte`: by tier, what a use pays to bring a byte from there in front of the model.
    """

    base_s: float
    token_s: float
    pair_s: float
    kv_bytes_a_token: int
    load_s_a_byte: Mapping[str, float] = field(default_factory=dict)

    def prefill_s(self, new: Number, behind: Number = 0) -> Number:
        """`new` tokens computed behind `behind` tokens that are there already; numbers, or arrays of them."""
        return self.base_s + self.token_s * new + self.pair_s * new * (behind + new / 2)

    def load_s(self, nbytes: Number, tier: str) -> Number:
        return self.load_s_a_byte.get(tier, 0.0) * nbytes

    def saved_s(self, tokens: Number, query_tokens: float, tier: str = "") -> Number:
        """What a use of a memory of `tokens` saves: the whole prefill less the query's and the load; at least 0."""
        with_it_s = self.prefill_s(query_tokens, tokens) + self.load_s(tokens * self.kv_bytes_a_token, tier)
        return np.maximum(0.0, self.prefill_s(tokens + query_tokens) - with_it_s)

    @classmethod
    def fitted(
        cls,
        samples: Sequence[tuple[int, int, float]],
        kv_bytes_a_token: int,
        load_s_a_byte: Mapping[str, float] | None = None,
    ) -> Costs:
        """Least squares over (new tokens, tokens behind, seconds), where variance grows with seconds; no term below 0.

        All samples' fitted seconds add up to the measured ones, for costs are used in sums (quasi-likelihood,
        Wedderburn 1974).

        Raises ConfigError for fewer than 3 samples.
        """
        if len(samples) < 3:
            raise ConfigError(f"Costs need 3 measured prefills or more, and got {len(samples)}. Measure more lengths.")
        new, behind, seconds = np.array(samples, dtype=float).T
        terms = np.stack([np.ones_like(new), new, new * (behind + new / 2)], axis=1)
        kept = [0, 1, 2]
        while True:  # a term that noise made negative is left out, and the others are fitted again
            found = _fit(terms[:, kept], seconds)
            if (found >= 0).all():
                break
            kept.remove(kept[int(found.argmin())])
        base_s, token_s, pair_s = (float(found[kept.index(term)]) if term in kept else 0.0 for term in range(3))
        return cls(base_s, token_s, pair_s, kv_bytes_a_token, load_s_a_byte or {})

    @classmethod
    def measured(cls, backend: Backend, load_s_a_byte: Mapping[str, float] | None = None) -> Costs:
        """Costs of the engine's own prefills, at a few lengths: some seconds for a small model on a CPU."""
        lengths = [tokens for tokens in CALIBRATION_TOKENS if tokens < backend.max_tokens]
        seconds = backend.measure_prefill(lengths)
        samples = [(tokens, 0, took_s) for tokens, took_s in zip(lengths, seconds, strict=True)]
        return cls.fitted(samples, kv_bytes_a_token(backend), load_s_a_byte)


class LoadEstimator:
    """Predicts what a load takes: as given in `costs`, otherwise as measured, and 0 s for a tier never loaded from.

    The planner and the prefix selection share one, so that both decide on the same figures.
    """

    def __init__(self, costs: Costs, load_times: LoadTimes | None = None) -> None:
        self.costs = costs
        self.load_times = load_times or LoadTimes()

    def is_given(self, tier: str) -> bool:
        """Whether `costs` states the tier's load time, so that measurements do not count."""
        return tier in self.costs.load_s_a_byte

    def load_s(self, tier: str, nbytes: int) -> float:
        """Seconds to load `nbytes` from the tier."""
        if self.is_given(tier):
            return float(self.costs.load_s(nbytes, tier))
        return self.load_times.expected_s(tier, nbytes) or 0.0

    def estimate(self, tier: str, nbytes: int, tokens: int) -> LoadEstimate:
        """The load of `nbytes` beside the prefill of the `tokens` that it spares."""
        return LoadEstimate(tier, nbytes, self.load_s(tier, nbytes), tokens, float(self.costs.saved_s(tokens, 0.0)))


def _fit(terms: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """The factor of each term, by least squares weighed by the fitted seconds, again until they stand."""
    fitted = seconds
    for _ in range(FIT_ROUNDS):
        weights = 1 / np.sqrt(fitted)
        scale = np.abs(terms).max(axis=0)  # pairs are millions, ones are ones
        found = np.linalg.lstsq(terms / scale * weights[:, None], seconds * weights, rcond=None)[0] / scale
        fitted = np.maximum(terms @ found, LEAST_SHARE * seconds)
    return found


def kv_bytes_a_token(backend: Backend) -> int:
    """Bytes of the keys and values of one token, all layers."""
    return backend.fingerprint.kv_bytes(1)
