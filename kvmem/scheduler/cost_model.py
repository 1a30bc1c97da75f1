"""Seconds of prefills and loads on this machine, measured, so that benefits are in seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
L1_ROUNDS = 30
L1_SHARE = 0.01
"""An error below this share of a sample's seconds counts as none, so that its weight stays finite."""
MIN_SHARE = 0.05
"""While weights are iterated, a sample's fitted seconds are at least this share of its measured seconds."""


@dataclass(frozen=True)
class Costs:
    """Seconds of a prefill: `base_s` + `token_s` per new token + `pair_s` per pair of a new and an attended token.

    load_s_a_byte: by tier, the seconds that loading one byte from it to the model's device takes.
    kv_bytes_a_memory: bytes of a memory beside those of its tokens: states, of a model with linear attention.
    """

    base_s: float
    token_s: float
    pair_s: float
    kv_bytes_a_token: int
    load_s_a_byte: Mapping[str, float] = field(default_factory=dict)
    kv_bytes_a_memory: int = 0

    def nbytes(self, tokens: Number) -> Number:
        """Bytes of a memory of `tokens`, as it is built; a number, or an array of them."""
        return tokens * self.kv_bytes_a_token + self.kv_bytes_a_memory

    def prefill_s(self, new: Number, behind: Number = 0) -> Number:
        """Seconds to compute `new` tokens behind `behind` cached ones; numbers, or arrays of them."""
        return self.base_s + self.token_s * new + self.pair_s * new * (behind + new / 2)

    def load_s(self, nbytes: Number, tier: str) -> Number:
        """Seconds to load `nbytes` from the tier; 0 for a tier that is not in `load_s_a_byte`."""
        return self.load_s_a_byte.get(tier, 0.0) * nbytes

    def saved_s(self, tokens: Number, query_tokens: float, tier: str = "") -> Number:
        """Seconds that a use of a memory of `tokens` saves: the prefill of the whole prompt, minus the query's prefill
        behind the memory and the load. At least 0."""
        injected_s = self.prefill_s(query_tokens, tokens) + self.load_s(self.nbytes(tokens), tier)
        return np.maximum(0.0, self.prefill_s(tokens + query_tokens) - injected_s)

    @classmethod
    def fitted(
        cls,
        samples: Sequence[tuple[int, int, float]],
        kv_bytes_a_token: int,
        load_s_a_byte: Mapping[str, float] | None = None,
        kv_bytes_a_memory: int = 0,
    ) -> Costs:
        """Fits (new tokens, cached tokens, seconds) by least squares, with variance proportional to the mean.

        No term is negative. The fitted seconds of all samples add up to the measured ones, because costs are used in
        sums (quasi-likelihood: Wedderburn 1974). Raises ConfigError for fewer than 3 samples.
        """
        if len(samples) < 3:
            raise ConfigError(f"Costs need 3 measured prefills or more, and got {len(samples)}. Measure more lengths.")
        return cls(*_factors(samples, _fit), kv_bytes_a_token, load_s_a_byte or {}, kv_bytes_a_memory)

    @classmethod
    def fitted_robustly(
        cls,
        samples: Sequence[tuple[int, int, float]],
        weights: np.ndarray,
        kv_bytes_a_token: int,
        kv_bytes_a_memory: int = 0,
    ) -> Costs:
        """As `fitted`, with the least weighted sum of absolute errors (L1) instead: outliers move it little.

        weights: (samples,). An error counts relative to the square root of the sample's seconds.
        """

        def fit(terms: np.ndarray, seconds: np.ndarray) -> np.ndarray:
            return _fit_l1(terms, seconds, weights / np.sqrt(seconds))

        return cls(*_factors(samples, fit), kv_bytes_a_token, {}, kv_bytes_a_memory)

    @classmethod
    def measured(cls, backend: Backend, load_s_a_byte: Mapping[str, float] | None = None) -> Costs:
        """Measures the engine's own prefills at a few lengths. Takes some seconds for a small model on a CPU."""
        lengths = [tokens for tokens in CALIBRATION_TOKENS if tokens < backend.max_tokens]
        seconds = backend.measure_prefill(lengths)
        samples = [(tokens, 0, took_s) for tokens, took_s in zip(lengths, seconds, strict=True)]
        return cls.fitted(samples, kv_bytes_a_token(backend), load_s_a_byte, backend.fingerprint.kv_bytes(0))


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
        """The load of `nbytes`, compared with the prefill of the `tokens` that it replaces."""
        return LoadEstimate(tier, nbytes, self.load_s(tier, nbytes), tokens, float(self.costs.saved_s(tokens, 0.0)))


def _factors(
    samples: Sequence[tuple[int, int, float]], fit: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> tuple[float, float, float]:
    """`base_s`, `token_s` and `pair_s` of these samples by `fit`; none is negative."""
    new, behind, seconds = np.array(samples, dtype=float).T
    terms = np.stack([np.ones_like(new), new, new * (behind + new / 2)], axis=1)
    kept = [0, 1, 2]
    while True:  # drops a term that noise made negative and fits the others again
        factors = fit(terms[:, kept], seconds)
        if (factors >= 0).all():
            break
        kept.remove(kept[int(factors.argmin())])
    base_s, token_s, pair_s = (float(factors[kept.index(term)]) if term in kept else 0.0 for term in range(3))
    return base_s, token_s, pair_s


def _fit_l1(terms: np.ndarray, seconds: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The factor of each term, (terms,), with the least sum of `weights` x absolute errors: weighted least squares,
    again and again, each error's weight divided by the error before (Schlossmacher 1973)."""
    scale = np.abs(terms).max(axis=0)
    errors = seconds
    for _ in range(L1_ROUNDS):
        roots = np.sqrt(weights / np.maximum(errors, L1_SHARE * seconds))
        factors: np.ndarray = np.linalg.lstsq(terms / scale * roots[:, None], seconds * roots, rcond=None)[0] / scale
        errors = np.abs(seconds - terms @ factors)
    return factors


def _fit(terms: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """The factor of each term, (terms,), by iteratively reweighted least squares."""
    fitted = seconds
    for _ in range(FIT_ROUNDS):
        weights = 1 / np.sqrt(fitted)
        scale = np.abs(terms).max(axis=0)  # pairs are in the millions, the constant term is 1
        factors: np.ndarray = (
            np.linalg.lstsq(terms / scale * weights[:, None], seconds * weights, rcond=None)[0] / scale
        )
        fitted = np.maximum(terms @ factors, MIN_SHARE * seconds)
    return factors


def kv_bytes_a_token(backend: Backend) -> int:
    """Bytes that each token adds to a memory, on all layers."""
    return backend.fingerprint.kv_bytes(1) - backend.fingerprint.kv_bytes(0)
