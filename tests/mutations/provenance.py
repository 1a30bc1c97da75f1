"""Rows of one folder that are not one measurement."""

from __future__ import annotations

import itertools
from typing import Any

from experiments.bench import bench
from tests.mutations.mutation import Mutation, Patch

KIND = "provenance"
TWO_CELLS = ("workload.query_tokens=[32,48]", "workload.max_cells=2")


def _changes(condition: str) -> Patch:
    """From the second cell on, `condition` has another value: as if the run was continued by other code."""

    def make(original: Any) -> Any:
        count = itertools.count()

        def conditions_now(self: Any) -> Any:
            return original(self) | {condition: f"version {next(count)}"}

        return conditions_now

    return Patch(bench.Bench, "conditions_now", make)


MUTATIONS = [
    Mutation(
        KIND, f"another {condition} in the second cell", f"values of {condition}", (_changes(condition),), TWO_CELLS
    )
    for condition in ("commit", "torch", "machine")
]
