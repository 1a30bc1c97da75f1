"""The arms that are timed for the verdict alone, beside those that a scenario compares."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from experiments.bench.bench import Bench
from experiments.measurement import BASELINE, Arm, ttft
from experiments.results import ALONE
from kvmem.prompt import Query, TokenizedPrompt


def judging_arms(bench: Bench, split: Callable[[Query], TokenizedPrompt]) -> dict[str, Arm]:
    """The independent forward pass on the whole prompt, and the engine's prefill of the query alone.

    split: the prompt of a query, split after the memory.
    """
    reference, backend = bench.reference, bench.backend
    return {
        BASELINE: Arm(partial(ttft.reference_sample, reference, split), reference.prepare),
        ALONE: Arm(partial(ttft.query_alone_sample, backend, split), backend.reset),
    }
