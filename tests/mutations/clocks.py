"""Clocks that leave out a part of the work, or that don't run with the time around them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from experiments.measurement import ttft
from tests.mutations.mutation import SMOLLM2, Mutation, Patch

KIND = "clocks"


def _sampled(arm: str, **shares: float) -> Patch:
    """Multiplies the named clocks of an arm's samples."""

    def make(original: Any) -> Any:
        def sample(*given: Any) -> Any:
            found = original(*given)
            return replace(found, **{name: share * getattr(found, name) for name, share in shares.items()})

        return sample

    return Patch(ttft, arm, make)


def _one_start(original: Any) -> Any:
    def interleaved(*given: Any, **named: Any) -> Any:
        samples = original(*given, **named)
        return {arm: [replace(one, started_s=1.0) for one in of_arm] for arm, of_arm in samples.items()}

    return interleaved


def _mutation(name: str, expected: str, patch: Patch) -> Mutation:
    return Mutation(KIND, name, expected, (patch,), SMOLLM2)


MUTATIONS = [
    _mutation("the injected timer starts 30% late", "not in its TTFT", _sampled("injected", user_s=0.7, engine_s=0.7)),
    _mutation("30% of the injected engine TTFT are lost", "in none of its parts", _sampled("injected", engine_s=0.7)),
    _mutation("10% of the injected engine TTFT are lost", "in none of its parts", _sampled("injected", engine_s=0.9)),
    _mutation("the direct clock runs 30% fast", "longer than the clock", _sampled("direct", user_s=1.3, engine_s=1.3)),
    _mutation("the direct engine TTFT exceeds the user's", "exceed the whole", _sampled("direct", engine_s=1.3)),
    _mutation("every call starts at the same time", "overlap in time", Patch(ttft, "interleaved", _one_start)),
]
