"""Compares one arm with the direct arm. The row has the same figures, equality and verdict in every scenario."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from experiments.bench.bench import Bench
from experiments.measurement import Sample, Trace, grade, ttft, validate_cell
from experiments.results import Row, TTFTPayload
from experiments.workloads import Cell
from kvmem.engines import MeasuredBackend

ENOUGH_FOR_P90 = 10


@dataclass(frozen=True)
class Arm:
    """The measurements of one arm: its TTFT samples, and a greedy answer with its logits."""

    samples: list[Sample]
    trace: Trace

    @property
    def engine_s(self) -> list[float]:
        return [sample.engine_s for sample in self.samples]

    @property
    def user_s(self) -> float:
        return median(sample.user_s for sample in self.samples)


def compare(
    bench: Bench,
    scenario: str,
    cell: Cell,
    arm: str,
    reused: Arm,
    direct: Arm,
    *,
    build_s: float,
    kv_bytes: int,
    memories: int = 1,
    conditions: dict[str, Any],
    measured_times: int | None = None,
    payload: Callable[..., TTFTPayload] = TTFTPayload,
    engine: MeasuredBackend | None = None,
) -> Row:
    """The row of `arm`, which reuses a memory, compared with the direct arm. Both were sampled in the same rounds.

    measured_times: how often all rounds were measured.
    payload: creates the scenario's payload from the fields of `TTFTPayload`.
    engine: the engine of both arms; None for the bench's own.
    """
    hit, plain = ttft.worst_hit(reused.samples), ttft.worst_hit(direct.samples)
    kv_s, direct_s = median(reused.engine_s), median(direct.engine_s)
    cached, whole = hit.token.cached_tokens, len(hit.prompt.ids)
    equality = grade(
        direct.trace,
        reused.trace,
        lambda step: ttft.rounding_noise(
            engine or bench.backend,
            plain.prompt.ids + direct.trace.token_ids[:step],
            len(hit.prompt.memory_ids),
        ),
    )
    limit_s, direct_limit_s = bench.limit_s(whole - cached, cached), bench.limit_s(len(plain.prompt.ids), 0)
    if kv_s < limit_s or direct_s < direct_limit_s:
        bench.recalibrate()
        limit_s, direct_limit_s = bench.limit_s(whole - cached, cached), bench.limit_s(len(plain.prompt.ids), 0)
    merge = bench.setup.merge
    cache_s = median(sample.cache_s for sample in reused.samples)
    verdict = validate_cell(
        direct_digest=plain.prompt.digest,
        injected_digest=hit.prompt.digest,
        direct_cached_tokens=plain.token.cached_tokens,
        cached_tokens=cached,
        # An engine that reuses only full blocks misses the tokens in the memory's last, partial block.
        expected_tokens=cell.context_tokens - (len(hit.prompt.memory_ids) - hit.expected_tokens),
        kv_ttft_s=kv_s,
        direct_ttft_s=direct_s,
        kv_limit_s=limit_s,
        direct_limit_s=direct_limit_s,
        build_s=build_s,
        merge_s=cache_s if memories > 1 else 0.0,
        equality=equality.grade,
        exact=memories == 1 or merge.exact,
    )
    saved_s = direct.user_s - reused.user_s
    decode = bench.backend.tokenizer.decode
    answers = {name: decode(list(of.trace.token_ids)) for name, of in (("injected", reused), ("direct", direct))}
    figures = payload(
        question=cell.question,
        truth=cell.truth,
        answers=answers,
        build_s=build_s,
        kv_bytes=kv_bytes,
        fetch_s=cache_s if memories == 1 else None,
        merge_s=cache_s if memories > 1 else None,
        kv_ttft_s=kv_s,
        direct_ttft_s=direct_s,
        kv_user_ttft_s=reused.user_s,
        direct_user_ttft_s=direct.user_s,
        speedup_pct=ttft.speedup_pct(reused.engine_s, direct.engine_s),
        speedup_interval=ttft.speedup_interval(reused.engine_s, direct.engine_s),
        break_even_queries=build_s / saved_s if saved_s > 0 else None,
        cached_tokens=cached,
        limit_s=limit_s,
        direct_limit_s=direct_limit_s,
        mfu=bench.roofline.mfu(whole - cached, cached, kv_s),
        measured_times=measured_times,
        spread={"injected": ttft.spread(reused.engine_s), "direct": ttft.spread(direct.engine_s)},
        kv_ttft_all_s=reused.engine_s,
        direct_ttft_all_s=direct.engine_s,
        kv_ttft_p90_s=p90(reused.engine_s),
        direct_ttft_p90_s=p90(direct.engine_s),
    )
    return bench.row(
        scenario,
        arm=arm,
        context_tokens=cell.context_tokens,
        query_tokens=cell.query_tokens,
        context_label=cell.context,
        query_label=cell.query,
        memories=memories,
        merge=merge.name if memories > 1 else "single",
        pairs=len(reused.samples),
        equality=equality.grade,
        first_difference=equality.first_difference,
        logit_max_abs_diff=equality.logit_max_abs_diff,
        near_tie_margin=equality.near_tie_margin,
        verdict=verdict.verdict,
        verdict_reason=verdict.reason,
        conditions=conditions | bench.conditions,  # `recalibrate` may have changed the rates
        payload=figures,
    )


def p90(seconds: Sequence[float]) -> float | None:
    """The 90th percentile; None for fewer than 10 samples."""
    return float(np.percentile(seconds, 90)) if len(seconds) >= ENOUGH_FOR_P90 else None
