"""Samples that are too few or too noisy for an interval."""

from __future__ import annotations

import itertools
import time
from typing import Any

from kvmem.engines.huggingface import HFBackend
from tests.mutations.mutation import SMOLLM2, Mutation, Patch, first_token_with_cache

KIND = "statistics"
DISTURBED = "was disturbed|drifted"


def _delayed(delay: Any) -> Patch:
    """Each hit takes longer by `delay(n)` times its own time; n counts the hits."""
    count = itertools.count()

    def body(first_token: Any, backend: Any, prompt: Any, cache: Any) -> Any:
        started = time.perf_counter()
        found = first_token(backend, prompt, cache)
        time.sleep(delay(next(count)) * (time.perf_counter() - started))
        return found

    return Patch(HFBackend, "first_token", first_token_with_cache(body))


MUTATIONS = [
    Mutation(KIND, "three pairs", "give no interval", (), ("scenario.pairs=3",)),
    Mutation(KIND, "five pairs", "give no interval", (), ("scenario.pairs=5",)),
    Mutation(KIND, "an arm that drifts", DISTURBED, (_delayed(lambda n: 0.3 * n),), SMOLLM2),
    Mutation(KIND, "half the hits are three times slower", DISTURBED, (_delayed(lambda n: 2 * (n % 2)),), SMOLLM2),
    Mutation(KIND, "an arm that stays disturbed", DISTURBED, (_delayed(lambda n: n % 5),), SMOLLM2),
]
