"""Runs the smallest cell with one planted fault, and says whether the run noticed it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments import run_experiment
from experiments.execution import doubts, mixtures, problems
from tests.mutations.mutation import Mutation

SMALLEST = (
    "model=tiny",
    "sink=none",
    "workload.context_tokens=[128]",
    "workload.query_tokens=[32]",
    "workload.max_cells=1",
)


@dataclass(frozen=True)
class Outcome:
    """noticed: no row is ok and the exit status is not 0. expected: a reason is the one that the fault should have."""

    noticed: bool
    expected: bool
    reasons: tuple[str, ...]
    verdict: Literal["ok", "undecided", "invalid"]
    """Of the run: what its exit status says."""

    @property
    def word(self) -> str:
        return "noticed" if self.noticed and self.expected else "by chance" if self.noticed else "ESCAPED"


def run(mutation: Mutation, out: Path, overrides: Sequence[str] = ()) -> Outcome:
    """Measures one cell with the fault in `mutation`, in the new folder `out`.

    `overrides` are Hydra's, after those of the suite and of the mutation: for another engine or device.
    """
    with ExitStack() as applied:
        for patch in mutation.patches:
            applied.enter_context(patch.applied())
        rows = run_experiment(*SMALLEST, *mutation.overrides, *overrides, out=out)
    wrong, mixed = problems(rows, exact=True), mixtures(rows)
    reasons = (*wrong, *doubts(rows), *mixed)
    ok = any(row.verdict == "ok" and _is_mutated(row.arm, mutation) for row in rows)
    verdict: Literal["ok", "undecided", "invalid"] = "invalid" if wrong else "undecided" if reasons else "ok"
    noticed = bool(mixed) or (bool(reasons) and not ok)  # a row is ok by itself, and the folder is not
    return Outcome(noticed, any(re.search(mutation.expected, reason) for reason in reasons), reasons, verdict)


def _is_mutated(arm: str, mutation: Mutation) -> bool:
    return not mutation.arm or arm == mutation.arm
