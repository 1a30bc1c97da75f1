"""Limits that catch nothing, and arms that are faster than the hardware allows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from experiments.bench import bench
from kvmem.engines.huggingface import HFBackend
from tests.mutations.mutation import SMOLLM2, Mutation, Patch, first_token_with_cache

KIND = "limit"
LOW = "calibrated rates are not plausible|times the data sheet|limit is 0"


def _rates(times: float) -> Patch:
    def make(original: Any) -> Any:
        def calibrate(*given: Any) -> Any:
            rates = original(*given)
            return replace(rates, flop_per_s=times * rates.flop_per_s, bytes_per_s=times * rates.bytes_per_s)

        return calibrate

    return Patch(bench, "calibrate", make)


def _limit(times: float) -> Patch:
    return Patch(
        bench.Bench, "limit_s", lambda original: lambda self, computed, cached: times * original(self, computed, cached)
    )


def _first_layers(first_token: Any, backend: Any, prompt: Any, cache: Any) -> Any:
    """Computes a sixth of the layers."""
    layers = backend.model.model.layers
    backend.model.model.layers = layers[: len(layers) // 6]
    try:
        return first_token(backend, prompt, cache)
    finally:
        backend.model.model.layers = layers


SKIPS = Patch(HFBackend, "first_token", first_token_with_cache(_first_layers))
MUTATIONS = [
    Mutation(KIND, "rates are 10 times too high", LOW, (_rates(10),), SMOLLM2),
    Mutation(KIND, "rates are 100 times too high", LOW, (_rates(100),), SMOLLM2),
    Mutation(KIND, "the limit is 0", LOW, (_limit(0),), SMOLLM2),
    Mutation(KIND, "rates are 10 times too low", "the hardware needs", (_rates(0.1),), SMOLLM2),
    Mutation(KIND, "the injected arm computes a sixth of the layers", "a logit|query alone", (SKIPS,), SMOLLM2),
    Mutation(KIND, "the same, and rates are 10 times too high", "a logit|query alone", (SKIPS, _rates(10)), SMOLLM2),
]
