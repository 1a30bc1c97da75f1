"""Every planted fault."""

from __future__ import annotations

from tests.mutations import (
    baseline,
    build,
    clocks,
    excusing_noise,
    few_or_noisy,
    formulas,
    hf_graph,
    limits,
    provenance,
    reuse_trace,
    storage,
    tiers,
    under_load,
    ungraded,
    wrong_kv,
)
from tests.mutations.mutation import Mutation

MUTATIONS: list[Mutation] = [
    mutation
    for kind in (
        wrong_kv,
        excusing_noise,
        ungraded,
        clocks,
        baseline,
        formulas,
        limits,
        hf_graph,
        few_or_noisy,
        build,
        provenance,
        tiers,
        reuse_trace,
        under_load,
        storage,
    )
    for mutation in kind.MUTATIONS
]
