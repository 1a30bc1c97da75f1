"""Compares one arm with the direct arm. The row has the same figures, equality and verdict in every scenario."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from experiments.bench.bench import Bench
from experiments.bench.stored_kv import kv_check, view_check
from experiments.measurement import (
    BASELINE,
    RULES_VERSION,
    Sample,
    Trace,
    grade,
    judge,
    judge_derived,
    products_seen,
    reference,
    statistics,
    ttft,
)
from experiments.results import ALONE, DerivedPayload, Evidence, Loss, Row, TimedCall, TTFTPayload, judged_figures
from experiments.workloads import Cell
from kvmem.cache import KVCacheItem

ENOUGH_FOR_P90 = 10
FARTHEST = 1e9
"""Stands for an infinite distance, which JSON does not have: an engine may report its largest logits only."""


@dataclass(frozen=True)
class Measured:
    """What was measured of one cell: the samples of every arm, in the same rounds, and the arms' longer answers."""

    samples: dict[str, list[Sample]]
    traces: dict[str, Trace]
    measured_times: int = 1
    """How often all rounds were run."""
    same_query: bool = False
    """Whether every round had the same query."""
    conditions: dict[str, Any] = field(default_factory=dict)
    calls_made: dict[str, int] = field(default_factory=dict)
    """How often each arm was called."""
    products: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What `products_of` found for the first sample of an arm."""
    context_tokens: Sequence[int] = ()
    """The length of each round's memory, where rounds have memories of several lengths; () is that of the cell."""

    def engine_s(self, arm: str) -> list[float]:
        return [sample.engine_s for sample in self.samples[arm]]

    def user_s(self, arm: str) -> float:
        return median(sample.user_s for sample in self.samples[arm])


@dataclass(frozen=True)
class TierEvidence:
    """What was measured of a tier beside its arm's calls; the fields are those of `Evidence`."""

    loss: Loss | None = None
    kv_off_built: float | None = None
    least_fetch_s: float | None = None
    view_off_stored: float | None = None
    """For a tier that gives other views than the engine; None compares the engine's view of the memory."""


def compare(
    bench: Bench,
    scenario: str,
    cell: Cell,
    arm: str,
    measured: Measured,
    *,
    items: Sequence[KVCacheItem],
    builds_s: Sequence[float],
    direct: str = "direct",
    payload: Callable[..., TTFTPayload] = TTFTPayload,
    beside: Sequence[str] = (),
    tier: TierEvidence | None = None,
    memories: int | None = None,
    peer: str = "",
    slack_s: float = 0.0,
) -> Row:
    """The row of `arm`, which reuses a memory, compared with the direct arm. Both were sampled in the same rounds.

    items: the memories that the arm reuses. builds_s: the seconds of every measured build of them.
    direct: the name of the direct arm.
    payload: makes the scenario's payload from the fields of `TTFTPayload`.
    beside: other arms whose calls the row's figures need.
    tier: what was measured of the tier that the arm loads the memory from.
    memories: the number of memories in a prompt; None: all of `items`.
    peer: the engine's own entry point that `arm` may not be slower than, sampled in the same rounds.
    slack_s: seconds that the arms' way to the engine may cost beside those of the baseline and the peer.
    The direct arm itself is judged if `arm` is its name.
    """
    reused, plain = measured.samples[arm], measured.samples[direct]
    hit = ttft.worst_hit(reused)
    kv_s, direct_s = median(measured.engine_s(arm)), median(measured.engine_s(direct))
    cached, whole = hit.token.cached_tokens, len(hit.prompt.ids)
    memories = len(items) if memories is None else memories
    traces = measured.traces
    judged_by = bench.reference
    equality = grade(
        traces[direct],
        traces[arm],
        lambda step: judged_by.logits(plain[0].prompt.ids, traces[direct].token_ids, step),
        bench.backend.dtype,
    )
    limit_s, direct_limit_s = _limit_s(bench, reused), _limit_s(bench, plain)
    if kv_s < limit_s or direct_s < direct_limit_s:
        bench.recalibrate()
        limit_s, direct_limit_s = _limit_s(bench, reused), _limit_s(bench, plain)
    merge = bench.setup.merge
    cache_s = median(sample.cache_s for sample in reused)
    kv = kv_check(bench, items)
    beside = (*beside, peer) if peer else beside
    context_tokens = measured.context_tokens or [cell.context_tokens]
    nbytes = {item.kv_cache_id: item.metadata.kv_bytes for item in items}  # one memory may be injected twice
    evidence = Evidence(
        calls=_calls(bench, measured, (arm, direct, *beside), context_tokens),
        calls_made={name: measured.calls_made[name] for name in (arm, direct) if name in measured.calls_made},
        exact=(memories == 1 or merge.exact) and (tier is None or tier.loss is None),
        direct_arm=direct,
        first_token_margins={name: _margin(traces[name], measured.samples[name][0]) for name in (arm, direct)},
        tolerance=equality.tolerance,
        rounding_noise=equality.rounding_noise,
        direct_off_reference=equality.direct_off_reference,
        injected_off_reference=equality.injected_off_reference,
        kv_off_reference=kv.token.off if kv else None,
        kv_tolerance=kv.token.allowed if kv else None,
        kv_scale_off=kv.scale.off if kv else None,
        kv_scale_tolerance=kv.scale.allowed if kv else None,
        view_off_stored=view_check(bench, items)
        if tier is None or tier.view_off_stored is None
        else tier.view_off_stored,
        reference=judged_by.name,
        build_all_s=list(builds_s),
        written_bytes=sum(nbytes.values()) if bench.backend.build_writes_file else 0,
        loss=tier.loss if tier else None,
        kv_off_built=tier.kv_off_built if tier else None,
        least_fetch_s=tier.least_fetch_s if tier else None,
        same_query=measured.same_query,
        peer_arm=peer,
        slack_s=slack_s,
    )
    saved_s, build_s = measured.user_s(direct) - measured.user_s(arm), median(builds_s)
    decode = bench.backend.tokenizer.decode
    answers = {name: decode(list(traces[of].token_ids)) for name, of in (("injected", arm), ("direct", direct))}
    figures = payload(
        question=cell.question,
        truth=cell.truth,
        answers=answers,
        build_s=build_s,
        kv_bytes=sum(nbytes.values()),
        fetch_s=cache_s if memories == 1 else None,
        merge_s=cache_s if memories > 1 else None,
        kv_ttft_s=kv_s,
        direct_ttft_s=direct_s,
        kv_user_ttft_s=measured.user_s(arm),
        direct_user_ttft_s=measured.user_s(direct),
        speedup_pct=statistics.speedup_pct(measured.engine_s(arm), measured.engine_s(direct)),
        speedup_interval=statistics.speedup_interval(measured.engine_s(arm), measured.engine_s(direct)),
        break_even_queries=build_s / saved_s if saved_s > 0 else None,
        cached_tokens=cached,
        limit_s=limit_s,
        direct_limit_s=direct_limit_s,
        mfu=None if measured.context_tokens else bench.roofline.mfu(whole - cached, cached, kv_s),
        measured_times=measured.measured_times,
        spread={
            "injected": statistics.spread(measured.engine_s(arm)),
            "direct": statistics.spread(measured.engine_s(direct)),
        },
        kv_ttft_all_s=measured.engine_s(arm),
        direct_ttft_all_s=measured.engine_s(direct),
        kv_ttft_p90_s=p90(measured.engine_s(arm)),
        direct_ttft_p90_s=p90(measured.engine_s(direct)),
        baseline_ttft_s=median(measured.engine_s(BASELINE)) if BASELINE in measured.samples else None,
        query_alone_s=median(measured.engine_s(ALONE)) if ALONE in measured.samples else None,
        evidence=evidence,
    )
    row = bench.row(
        scenario,
        arm=arm,
        context_tokens=cell.context_tokens,
        query_tokens=cell.query_tokens,
        context_label=cell.context,
        query_label=cell.query,
        memories=memories,
        merge=merge.name if memories > 1 else "single",
        pairs=len(reused),
        equality=equality.grade,
        first_difference=equality.first_difference,
        logit_max_abs_diff=equality.logit_max_abs_diff,
        near_tie_margin=equality.near_tie_margin,
        conditions=measured.conditions | bench.conditions,  # the limit may have been calibrated again
        payload=figures,
    )
    return judged_again(row)


def _limit_s(bench: Bench, samples: Sequence[Sample]) -> float:
    """The median of the rounds' limits: no arm's median is below it if none of its calls is below its own."""
    cached = [sample.token.cached_tokens for sample in samples]
    return median(
        bench.limit_s(len(sample.prompt.ids) - held, held) for sample, held in zip(samples, cached, strict=True)
    )


def judged_again(row: Row) -> Row:
    """`row` with the verdict that its stored figures give it."""
    figures = judged_figures(row)
    if figures is not None:
        verdict = judge(row, figures)
    else:
        assert isinstance(row.payload, DerivedPayload)
        verdict = judge_derived(row, row.payload)
    return dataclasses.replace(row, verdict=verdict.verdict, verdict_reason=verdict.reason, rules=RULES_VERSION)


def timed_calls(samples: dict[str, list[Sample]]) -> list[TimedCall]:
    """The clocks of all samples, in order of time, for what is not a first token."""
    calls = [
        TimedCall(
            arm=arm,
            round=round_,
            started_s=sample.started_s,
            outer_s=sample.outer_s,
            user_s=sample.user_s,
            engine_s=sample.engine_s,
            token=sample.token.id,
            prompt_tokens=0,
            digest="",
            ordinal=sample.ordinal,
        )
        for arm, of_arm in samples.items()
        for round_, sample in enumerate(of_arm)
    ]
    return sorted(calls, key=lambda call: call.started_s)


def _calls(bench: Bench, measured: Measured, arms: Sequence[str], context_tokens: Sequence[int]) -> list[TimedCall]:
    """The timed calls of `arms`, of which the second is the direct one, and of those that they are held to, in order.

    An arm that covers a part of its prompt by a memory is a hit. context_tokens: by round, or one for all rounds.
    """
    arm, direct = arms[:2]
    names = [name for name in dict.fromkeys((*arms, BASELINE, ALONE)) if name in measured.samples]
    calls = []
    for name in names:
        for round_, (sample, plain) in enumerate(zip(measured.samples[name], measured.samples[direct], strict=True)):
            is_hit = name == arm != direct
            calls.append(
                TimedCall(
                    arm=name,
                    round=round_,
                    started_s=sample.started_s,
                    outer_s=sample.outer_s,
                    user_s=sample.user_s,
                    engine_s=sample.engine_s,
                    cache_s=sample.cache_s,
                    split_s=sample.split_s,
                    token=sample.token.id,
                    prompt_tokens=len(sample.prompt.ids),
                    digest=sample.prompt.digest,
                    cached_tokens=sample.token.cached_tokens,
                    # An engine that reuses whole blocks only misses the rest of the memory's last block.
                    expected_tokens=context_tokens[round_ % len(context_tokens)]
                    - (len(sample.prompt.memory_ids) - sample.expected_tokens)
                    if is_hit
                    else 0,
                    computed_tokens=sample.computed_tokens,
                    logits_apart=_apart(bench, sample, plain) if is_hit else None,
                    ordinal=sample.ordinal,
                    **(measured.products.get(name, {}) if round_ == 0 else {}),
                )
            )
    return sorted(calls, key=lambda call: call.started_s)


def products_of(bench: Bench, sample: Sample, run: Callable[[str], Sample], query: str) -> dict[str, Any]:
    """The fields of `TimedCall` that one more call, `run(query)`, gives for `sample`; {} where a hook counts tokens."""
    found = products_seen(bench.backend, lambda: run(query).token)
    if found is None:
        return {}
    token, tokens = found
    apart = None
    if token.logits_V is not None and sample.token.logits_V is not None:
        apart = reference.max_abs_diff(token.logits_V, sample.token.logits_V)
    return {"products_tokens": tokens, "products_apart": apart}


def _apart(bench: Bench, sample: Sample, plain: Sample) -> float | None:
    """How far the logits of two timed calls with the same prompt are apart.

    Where the engine does not keep them and the tokens differ, half the distance of the two tokens in the reference's
    logits: the least move of each that explains it. None where the tokens are equal.
    """
    if sample.token.logits_V is not None and plain.token.logits_V is not None:
        return reference.max_abs_diff(sample.token.logits_V, plain.token.logits_V)
    if sample.token.id == plain.token.id:
        return None
    logits_V = bench.reference.logits(plain.prompt.ids, (plain.token.id,), None).runs[0][0]
    return min(float((logits_V[plain.token.id] - logits_V[sample.token.id]).abs()) / 2, FARTHEST)


def _margin(trace: Trace, timed: Sample) -> float:
    """By how much the graded answer prefers its first token to the timed one; 0 if they are the same."""
    return min(float(trace.logits_SV[0, trace.token_ids[0]] - trace.logits_SV[0, timed.token.id]), FARTHEST)


def p90(seconds: Sequence[float]) -> float | None:
    """The 90th percentile; None for fewer than 10 samples."""
    return float(np.percentile(seconds, 90)) if len(seconds) >= ENOUGH_FOR_P90 else None
