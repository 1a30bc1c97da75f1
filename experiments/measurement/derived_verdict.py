"""Whether figures that follow from other rows, or from a simulation, can be trusted: the rules that apply to them."""

from __future__ import annotations

from experiments.measurement.recomputed import wrong_derived_figures
from experiments.measurement.verdict import Verdict, number, refers_to_valid
from experiments.results import DerivedPayload, Row


def judge_derived(row: Row, payload: DerivedPayload) -> Verdict:
    """Applies the rules to a row that times nothing itself, from what the row stores alone."""
    failed = [
        f"{name} is stored as {number(stored)}, and what the row stores gives {number(again)}"
        for name, stored, again in wrong_derived_figures(row, payload)
    ]
    if failed := [*failed, *payload.failures(row)]:
        return Verdict("invalid", "; ".join(failed))
    if doubts := list(refers_to_valid(row)):
        return Verdict("undecided", "; ".join(doubts))
    return Verdict("ok", "; ".join(payload.remarks()))
