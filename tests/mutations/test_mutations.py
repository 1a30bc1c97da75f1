"""A quick subset of the suite, on the tiny model, and an honest run of the same cell."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations.catalogue import MUTATIONS
from tests.mutations.mutation import Mutation
from tests.mutations.suite import run

QUICK = (
    "stored: values scaled",
    "positions behind a cache are 7 off",
    "a remembered token is returned and the query counted",
    "the cache is ignored and its hit claimed",
    "the arms are not interleaved",
    "the build time is halved",
    "the first of two runs is kept as the better one",
    "another commit in the second cell",
    "a compressed tier returns noise",
    "a saving is too large",
    "each prompt's logits are remembered",
    "the replay computes nothing",
)


@pytest.mark.parametrize("name", QUICK)
def test_a_planted_fault_is_noticed(name: str, tmp_path: Path) -> None:
    (mutation,) = (one for one in MUTATIONS if one.name == name)
    outcome = run(mutation, tmp_path / "run")
    assert outcome.noticed and outcome.expected, outcome.reasons


def test_an_honest_run_is_not_invalid(tmp_path: Path) -> None:
    outcome = run(Mutation("none", "nothing", "", ()), tmp_path / "run")
    assert outcome.verdict != "invalid", outcome.reasons


def test_every_fault_has_a_name_of_its_own() -> None:
    names = [(mutation.kind, mutation.name) for mutation in MUTATIONS]
    assert len(set(names)) == len(names) >= 60
