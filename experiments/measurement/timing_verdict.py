"""Whether times of something else than first tokens can be trusted: the rules of a first token that apply to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from experiments.measurement import verdict as rules
from experiments.measurement.verdict import Verdict
from experiments.results import Evidence, Row, Timed, TimedPayload

Rule = Callable[[Row, Timed, Evidence], Iterator[str]]
RULES: tuple[Rule, ...] = (
    rules.limit,
    rules.baseline,
    rules.clocks,
    rules.interleaved,
    rules.last_run_counts,
    rules.returned_kv,
)
DOUBTS: tuple[Rule, ...] = (rules.enough_pairs, rules.calm, rules.baseline_is_clear)
CLOSE = 1e-6


def judge_timings(row: Row, figures: TimedPayload) -> Verdict:
    """Applies the rules to each pair of arms of a row, from what the row stores alone."""
    if not figures.timings:
        return Verdict("undecided", "the row has no evidence: it was measured before these rules")
    if failed := [*_apply(RULES, row, figures), *_wrong_figures(figures)]:
        return Verdict("invalid", "; ".join(failed))
    doubts = list(dict.fromkeys(_apply(DOUBTS, row, figures)))
    return Verdict("undecided", "; ".join(doubts)) if doubts else Verdict("ok", "; ".join(figures.remarks()))


def _apply(chosen: tuple[Rule, ...], row: Row, figures: TimedPayload) -> Iterator[str]:
    for timing in figures.timings:
        of_arm = replace(row, arm=timing.arm)
        for rule in chosen:
            yield from rule(of_arm, timing, timing.evidence)


def _wrong_figures(figures: TimedPayload) -> Iterator[str]:
    for name, again in figures.from_calls().items():
        stored = getattr(figures, name)
        if not math.isclose(stored, again, rel_tol=CLOSE):
            yield f"{name} is stored as {stored:.6g}, and the timed calls give {again:.6g}"
