"""The figures and the verdict of one row, computed again from the samples that the row stores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any, Literal

import numpy as np

from experiments.audit.finding import Finding
from experiments.measurement import (
    BASELINE,
    RULES_VERSION,
    Verdict,
    judge,
    judge_derived,
    judge_timings,
    recomputed,
    statistics,
)
from experiments.measurement import verdict as rules
from experiments.results import DerivedPayload, Evidence, Row, TimedPayload, TTFTPayload, judged_figures

CLOSE = 1e-6
"""Relative difference of two numbers that are the same but for rounding."""
Checked = Literal["judged again", "checked by what is stored", "failed", "not measured"]


def checked_as(row: Row) -> Checked:
    """How a row can be checked: by the rules of now, or only by what it stores."""
    if row.status == "failed":
        return "failed"
    if row.payload is not None and not row.payload.is_measured:
        return "not measured"
    figures = judged_figures(row)
    judged = figures is not None and figures.evidence is not None and row.rules == RULES_VERSION
    judged |= isinstance(row.payload, TimedPayload) and bool(row.payload.timings)
    judged |= _is_derived(row)
    return "judged again" if judged else "checked by what is stored"


def _is_derived(row: Row) -> bool:
    """Whether the figures of a row follow from what it stores, and it times nothing itself."""
    return isinstance(row.payload, DerivedPayload) and judged_figures(row) is None and row.rules == RULES_VERSION


def name_of(row: Row) -> str:
    """A row's name in a finding: its scenario, its cell and its arm."""
    cell = row.conditions.get("cell", f"{row.context_tokens}/{row.query_tokens}")
    return " ".join(str(part) for part in (row.scenario, cell, row.arm) if part)


def check_row(row: Row) -> list[Finding]:
    """What in a row contradicts the samples that it stores. Empty if it all agrees."""
    if row.status == "failed":
        return []
    if row.payload is None:
        return [Finding(name_of(row), "it is no failed row, and has no figures")]
    figures = judged_figures(row)
    texts: list[str] = list(_by_name(row))
    if isinstance(row.payload, TimedPayload) and row.payload.timings:
        texts += _same_verdict(row, judge_timings(row, row.payload))
    if isinstance(row.payload, DerivedPayload) and _is_derived(row):
        texts += _derived(row, row.payload)
    if figures is not None:
        texts += _speedup_in_interval(figures)
        texts += _grade(row, figures.evidence)
        if figures.evidence is not None and row.rules == RULES_VERSION:
            texts += _by_the_rules(row, figures, figures.evidence)
        else:
            texts += _by_older_rules(row, figures)
    return [Finding(name_of(row), text) for text in texts]


def same(stored: float | None, again: float | None) -> bool:
    if stored is None or again is None:
        return stored is again
    return math.isclose(stored, again, rel_tol=CLOSE, abs_tol=1e-12)


def _differs(name: str, stored: float | None, again: float | None, source: str = "the samples give") -> Iterator[str]:
    if not same(stored, again):
        yield f"{name} is stored as {_number(stored)}, and {source} {_number(again)}"


def _by_the_rules(row: Row, figures: TTFTPayload, evidence: Evidence) -> Iterator[str]:
    """Each figure from the timed calls, and the verdict and its reason by the rules."""
    try:
        for name, stored, again in recomputed.wrong_figures(row, figures, evidence):
            yield f"{name} is stored as {_number(stored)}, and the timed calls give {_number(again)}"
        verdict = judge(row, figures)
    except (ValueError, ZeroDivisionError, IndexError) as error:  # calls that are missing, or not in pairs
        yield f"its timed calls can't be judged: {error}"
        return
    yield from _same_verdict(row, verdict)
    arms = (
        ("injected", row.arm, figures.kv_ttft_all_s, figures.kv_ttft_p90_s),
        ("direct", evidence.direct_arm, figures.direct_ttft_all_s, figures.direct_ttft_p90_s),
    )
    for name, arm, listed, p90_s in arms:
        calls = sorted((call for call in evidence.calls if call.arm == arm), key=lambda call: call.round)
        seconds = [call.engine_s for call in calls]
        if list(listed) != seconds:
            yield f"the list of {name} TTFTs is not that of its timed calls"
        yield from _differs(f"the spread of the {name} arm", figures.spread.get(name), statistics.spread(seconds))
        if p90_s is not None:
            yield from _differs(f"the 90th percentile of the {name} arm", p90_s, float(np.percentile(seconds, 90)))
    baseline = [call.engine_s for call in evidence.calls if call.arm == BASELINE]
    yield from _differs("the TTFT of the baseline", figures.baseline_ttft_s, median(baseline) if baseline else None)


def _derived(row: Row, payload: DerivedPayload) -> Iterator[str]:
    """Each figure from what the row stores, and its verdict, if it has one: a prediction has none."""
    for name, stored, again in recomputed.wrong_derived_figures(row, payload):
        yield f"{name} is stored as {_number(stored)}, and what the row stores gives {_number(again)}"
    if row.verdict is not None:
        yield from _same_verdict(row, judge_derived(row, payload))


def _same_verdict(row: Row, verdict: Verdict) -> Iterator[str]:
    if verdict.verdict != row.verdict:
        yield f"the verdict is stored as {row.verdict}, and the rules say {verdict.verdict}: {verdict.reason or 'ok'}"
    elif verdict.reason != row.verdict_reason:
        yield f"the verdict's reason is stored as {row.verdict_reason!r}, and the rules say {verdict.reason!r}"


def _by_older_rules(row: Row, figures: TTFTPayload) -> Iterator[str]:
    """What rows of older rules allow: their medians, and the rules that need no more."""
    kv_s, direct_s = figures.kv_ttft_all_s, figures.direct_ttft_all_s
    if kv_s and direct_s:
        if len(kv_s) != len(direct_s) or len(kv_s) != row.pairs:
            yield f"it says {row.pairs} pairs, and stores {len(kv_s)} injected and {len(direct_s)} direct samples"
            return
        # Two formulas were in use: of the paired ratios' median, and of the medians' ratio.
        paired = statistics.speedup_pct(kv_s, direct_s)
        if not same(figures.speedup_pct, 100 * (1 - median(kv_s) / median(direct_s))):
            yield from _differs("the speed-up", figures.speedup_pct, paired)
    yield from _break_even(figures)
    if row.verdict == "ok":
        for arm, times in (("injected", figures.kv_arm), ("direct", figures.direct_arm)):
            if times.limit_s is not None and (reason := rules.beats_limit(arm, times.ttft_s, times.limit_s)):
                yield f"the verdict is stored as ok, and {reason}"
        merge_s = figures.merge_s or 0.0
        if reason := rules.direct_too_slow(figures.direct_ttft_s, figures.build_s, figures.kv_ttft_s, merge_s):
            yield f"the verdict is stored as ok, and {reason}"


def _break_even(figures: TTFTPayload) -> Iterator[str]:
    """By the user TTFT saved; the first rows had it by the engine TTFT saved."""
    user_s = figures.direct_user_ttft_s - figures.kv_user_ttft_s
    engine_s = figures.direct_ttft_s - figures.kv_ttft_s
    queries = [figures.build_s / saved_s if saved_s > 0 else None for saved_s in (user_s, engine_s)]
    if not any(same(figures.break_even_queries, again) for again in queries):
        yield from _differs("break even", figures.break_even_queries, queries[0], "its build and its TTFTs give")


def _speedup_in_interval(figures: TTFTPayload) -> Iterator[str]:
    if figures.speedup_interval is None:
        return
    low, high = figures.speedup_interval
    if not low - CLOSE <= figures.speedup_pct <= high + CLOSE:
        yield f"the speed-up of {figures.speedup_pct:.4g}% lies outside its interval, {low:.4g} to {high:.4g}%"


def _grade(row: Row, evidence: Evidence | None) -> Iterator[str]:
    """Whether the grade of the answers fits the differences that are stored beside it."""
    differ = row.equality in ("near_tie", "diverged")
    if row.equality is not None and row.equality != "diverged" and differ != (row.first_difference is not None):
        first = "no token that differs" if differ else f"a difference at token {row.first_difference}"
        yield f"the equality is stored as {row.equality}, with {first}"
    apart, allowed = row.logit_max_abs_diff, evidence.tolerance if evidence else None
    if row.equality == "bitwise" and apart:
        yield f"the equality is stored as bitwise, with a logit {apart:.3g} apart"
    if row.equality == "tokens" and apart is not None and allowed is not None and apart > allowed:
        yield f"the equality is stored as tokens, with a logit {apart:.3g} apart; rounding explains {allowed:.3g}"


def _by_name(row: Row) -> Iterator[str]:
    """Figures that their names tie to others: the median of a list of samples, and what lies in an interval."""
    fields = _fields(row)
    for name, value in fields.items():
        if name.endswith("_all_s") and value and not name.startswith("net_"):
            of_samples = f"{name.removesuffix('_all_s')}_s"
            if fields.get(of_samples) is not None and _is_numbers(value):
                yield from _differs(of_samples, fields[of_samples], median(value))
        if name.endswith("_interval") and value is not None and name != "speedup_interval":
            figure = name.removesuffix("_interval")
            stored = fields.get(figure, fields.get(f"{figure}_pct"))
            if stored is not None and not value[0] - CLOSE <= stored <= value[1] + CLOSE:
                yield f"{figure} of {stored:.4g} lies outside its interval, {value[0]:.4g} to {value[1]:.4g}"
        if name.endswith("_low_s") and value is not None:
            stem = name.removesuffix("_low_s")
            middle, high = fields.get(f"{stem}_s"), fields.get(f"{stem}_high_s")
            if middle is not None and high is not None and not value <= middle <= high:
                yield f"{stem}_s of {middle:.4g} lies outside {value:.4g} to {high:.4g}"


def _fields(row: Row) -> dict[str, Any]:
    payload = row.payload
    return {} if payload is None else {own.name: getattr(payload, own.name) for own in dataclasses.fields(payload)}


def _is_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"
