"""The verdict: every rule fails for its own reason, and the published rows that are known to fail do fail."""

from __future__ import annotations

import dataclasses
from functools import cache
from statistics import median
from typing import Any

import pytest

from experiments.measurement import BASELINE, Verdict, judge, statistics
from experiments.measurement.published_rules import Finding, hardware_card, validate_published
from experiments.results import ALONE, Evidence, TimedCall, TTFTPayload, published
from tests.helpers.rows import ttft_row

KNOWN = [row for row in published.tables() if row.table in ("huggingface_ttft", "vllm_ttft")]

ROUNDS = 6
ARMS = {"injected": 0.2, "direct": 1.0, BASELINE: 1.0, ALONE: 0.19}
"""Seconds of each arm of a sound cell: 583 tokens of memory and 30 of query."""


def sound_calls() -> list[TimedCall]:
    """Six rounds of four arms, one after the other, in an order that turns."""
    calls, now = [], 0.0
    names = list(ARMS)
    for round_ in range(ROUNDS):
        for name in names[round_ % 4 :] + names[: round_ % 4]:
            tokens = 30 if name == ALONE else 613
            cached = 583 if name == "injected" else 0
            seconds = ARMS[name] * (1 + 0.001 * (round_ - 2.5))
            calls.append(
                TimedCall(
                    arm=name,
                    round=round_,
                    started_s=now,
                    outer_s=seconds + 1e-4,
                    user_s=seconds,
                    engine_s=seconds * 0.9,
                    cache_s=seconds * 0.05,
                    token=7,
                    prompt_tokens=tokens,
                    digest=f"{name if name == ALONE else 'whole'} {round_}",
                    cached_tokens=cached,
                    expected_tokens=cached,
                    computed_tokens=tokens - cached,
                    logits_apart=1e-5 if name == "injected" else None,
                )
            )
            now += seconds + 2e-4
    return calls


def changed(arm: str, **fields: Any) -> list[TimedCall]:
    """The sound calls with other fields in every call of `arm`; a function is given the old value."""
    return [
        dataclasses.replace(
            call, **{name: value(getattr(call, name)) if callable(value) else value for name, value in fields.items()}
        )
        if call.arm == arm
        else call
        for call in sound_calls()
    ]


def derived(evidence: Evidence, memories: int) -> dict[str, Any]:
    """The figures that follow from the timed calls."""
    clocks = {
        (arm, clock): [getattr(call, clock) for call in evidence.calls if call.arm == arm]
        for arm in ARMS
        for clock in ("engine_s", "user_s", "cache_s")
    }
    kv_s, direct_s = clocks["injected", "engine_s"], clocks["direct", "engine_s"]
    kv_user_s, direct_user_s = median(clocks["injected", "user_s"]), median(clocks["direct", "user_s"])
    cache_s, build_s = median(clocks["injected", "cache_s"]), median(evidence.build_all_s)
    return {
        "kv_ttft_s": median(kv_s),
        "direct_ttft_s": median(direct_s),
        "kv_user_ttft_s": kv_user_s,
        "direct_user_ttft_s": direct_user_s,
        "speedup_pct": statistics.speedup_pct(kv_s, direct_s),
        "speedup_interval": statistics.speedup_interval(kv_s, direct_s),
        "break_even_queries": build_s / (direct_user_s - kv_user_s) if direct_user_s > kv_user_s else None,
        "build_s": build_s,
        "merge_s": cache_s if memories > 1 else None,
        "fetch_s": cache_s if memories == 1 else None,
        "query_alone_s": median(clocks[ALONE, "engine_s"]) if clocks[ALONE, "engine_s"] else None,
        "pairs": len(kv_s),
    }


def judged(figures: dict[str, Any] | None = None, row: dict[str, Any] | None = None, **evidence: Any) -> Verdict:
    """The verdict on a sound cell with some things changed: figures of the payload, fields of the row, the evidence."""
    sound = Evidence(
        **{
            "calls": sound_calls(),
            "first_token_margins": {"injected": 0.0, "direct": 0.0},
            "tolerance": 1e-4,
            "direct_off_reference": 2e-5,
            "injected_off_reference": 2e-5,
            "kv_off_reference": 1e-5,
            "kv_tolerance": 1e-4,
            "reference": "transformers' own forward pass",
            "build_all_s": [0.79, 0.8, 0.81],
            **evidence,
        }
    )
    times = {"limit_s": 0.1, "direct_limit_s": 0.8, **derived(sound, (row or {}).get("memories", 1))}
    known = ttft_row(583, 30, **{**times, **(figures or {}), **(row or {})}, evidence=sound)
    payload = known.payload
    assert isinstance(payload, TTFTPayload)
    return judge(known, payload)


SLOW = [0.3, 0.31, 0.32]
BROKEN: dict[str, dict[str, Any]] = {
    "the arms received different token ids (whole 0 direct, other injected)": {
        "calls": changed("injected", digest="other")
    },
    "0 tokens came from the cache, 583 were expected": {
        "calls": changed("injected", cached_tokens=0, computed_tokens=613)
    },
    "600 tokens came from the cache, 583 were expected": {
        "calls": changed("injected", cached_tokens=600, computed_tokens=13)
    },
    "583 tokens of the direct arm came from a cache": {
        "calls": changed("direct", cached_tokens=583, computed_tokens=30)
    },
    "15 tokens entered the model in the injected arm, and its prompt needs 30": {
        "calls": changed("injected", computed_tokens=15)
    },
    "677 tokens entered the model in the direct arm, and its prompt needs 613": {
        "calls": changed("direct", computed_tokens=677)
    },
    "the injected arm took 180 ms, and the hardware needs 190 ms": {"figures": {"limit_s": 0.19}},
    "the direct arm took 900 ms, and the hardware needs 1100 ms": {"figures": {"direct_limit_s": 1.1}},
    "it did not compute all of it": {"calls": changed(ALONE, engine_s=lambda s: 1.5 * s)},
    "the direct baseline is too slow: 1.11 times transformers' own forward pass": {
        "calls": changed(BASELINE, engine_s=lambda s: 0.9 * s)
    },
    "for the work of build and injected arm": {"build_all_s": SLOW},
    "of a call of the injected arm are not in its TTFT": {
        "calls": changed("injected", user_s=lambda s: 0.95 * s, cache_s=0.0)
    },
    "the parts of the direct arm's TTFT exceed the whole": {"calls": changed("direct", cache_s=0.5)},
    "the direct arm's clock ran longer than the clock around it": {
        "calls": changed("direct", outer_s=lambda s: 0.99 * s)
    },
    "the speed-up is stored as 90, and the timed calls give 80": {"figures": {"speedup_pct": 90.0}},
    "the build time is stored as 0.4, and the timed calls give 0.8": {"figures": {"build_s": 0.4}},
    "of the injected arm's user TTFT are in none of its parts": {
        "calls": changed("injected", engine_s=lambda s: 0.98 * s, cache_s=0.0, split_s=0.0)
    },
    "the answers diverge, and a logit is": {"row": {"equality": "diverged"}},
    "the answers have equal tokens, and a logit is 0.5 off": {
        "row": {"equality": "drifted", "logit_max_abs_diff": 0.5}
    },
    "a logit of the direct arm is 0.1 off that of transformers' own forward pass": {"direct_off_reference": 0.1},
    "the answers were not graded": {"tolerance": None},
    "the injected arm's timed call returned another token": {"first_token_margins": {"injected": 0.3}},
    "in round 0 a logit of the timed injected call is 2 off": {"calls": changed("injected", logits_apart=2.0)},
    "in round 0 the two arms returned different tokens": {"calls": changed("injected", logits_apart=None, token=9)},
    "the stored KV of a token is 0.01 off": {"kv_off_reference": 0.01},
    "the stored KV of a layer is 1.01 or 0.99 times": {"kv_scale_off": 0.01, "kv_scale_tolerance": 0.002},
    "the view that an answer is given is up to 0.5 off the stored memory": {"view_off_stored": 0.5},
}


def test_a_sound_cell_is_ok() -> None:
    assert judged() == Verdict("ok", "")
    assert judged(row={"equality": "near_tie"}) == Verdict("ok", "")


@pytest.mark.parametrize("reason", BROKEN)
def test_each_rule_fails_for_its_own_reason(reason: str) -> None:
    verdict = judged(**BROKEN[reason])
    assert verdict.verdict == "invalid"
    assert reason in verdict.reason
    assert ";" not in verdict.reason.replace("; the injection is exact", "")


def test_arms_that_were_not_interleaved_are_noticed() -> None:
    one_after_the_other = sorted(sound_calls(), key=lambda call: call.arm)
    moved, now = [], 0.0
    for call in one_after_the_other:
        moved.append(dataclasses.replace(call, started_s=now))
        now += call.outer_s + 1e-4
    assert "the arms were not interleaved" in judged(calls=moved).reason
    overlapping = [dataclasses.replace(call, started_s=0.9 * call.started_s) for call in sound_calls()]
    assert "two calls overlap in time" in judged(calls=overlapping).reason


def test_every_reason_is_listed() -> None:
    verdict = judged(figures={"limit_s": 0.19}, build_all_s=SLOW, kv_off_reference=1.0)
    assert verdict.reason.count("; ") == 2


def test_a_merge_counts_as_work_of_the_direct_arm() -> None:
    builds_s = [0.55, 0.563, 0.563]
    assert judged(build_all_s=builds_s).verdict == "invalid"
    assert judged(build_all_s=builds_s, row={"memories": 2}).verdict == "ok"


def test_a_merge_may_compute_tokens_of_its_memories_again() -> None:
    more, fewer = (changed("injected", computed_tokens=count) for count in (33, 29))
    two = {"memories": 2}
    assert judged(calls=more, row=two).verdict == "ok"
    assert judged(calls=more).verdict == judged(calls=fewer, row=two).verdict == "invalid"


def test_divergence_is_accepted_for_a_merge_that_is_not_exact() -> None:
    verdict = judged(exact=False, row={"equality": "diverged", "memories": 2})
    assert verdict.verdict == "ok"
    assert "this merge is not exact" in verdict.reason


def disturbed(arm: str, rounds: range, factor: float) -> list[TimedCall]:
    """The sound calls, those of `arm` in `rounds` longer by `factor`."""
    return [
        dataclasses.replace(call, engine_s=call.engine_s * factor) if call.arm == arm and call.round in rounds else call
        for call in sound_calls()
    ]


def test_a_build_that_writes_a_file_is_left_the_time_of_its_bytes() -> None:
    build_s = [4.0, 4.1, 4.2]
    assert judged(build_all_s=build_s, written_bytes=800_000_000).verdict == "ok"
    doubt = judged(build_all_s=build_s, written_bytes=500_000_000)
    assert doubt.verdict == "undecided" and "its file can be written in 2 s" in (doubt.reason or "")


def drifting(call: TimedCall) -> dict[str, float]:
    """Each round takes 4% less than the one before."""
    less = 0.04 * call.round * call.engine_s
    return {name: getattr(call, name) - less for name in ("engine_s", "user_s", "outer_s")}


def trace_calls(arm: str = "", rounds: range = range(0), factor: float = 1.0) -> list[TimedCall]:
    """The sound calls as a trace has them, with other lengths in each round; those of `arm` in `rounds` are longer by
    `factor`."""
    calls = []
    for call in sound_calls():
        memory, query = 500 + 40 * (call.round % 4), 20 + 5 * (call.round % 3)
        cached = memory if call.arm == "injected" else 0
        prompt = query if call.arm == ALONE else memory + query
        seconds = 1e-3 * (prompt - cached + 5 * (call.arm == "injected"))
        if call.arm == arm and call.round in rounds:
            seconds *= factor
        changes: dict[str, Any] = {"prompt_tokens": prompt, "cached_tokens": cached, "expected_tokens": cached}
        changes |= {"computed_tokens": prompt - cached, "engine_s": seconds, "user_s": seconds, "outer_s": seconds}
        calls.append(dataclasses.replace(call, **changes, cache_s=0.0))
    return calls


TRACE: dict[str, Any] = {"figures": {"limit_s": 0.01, "direct_limit_s": 0.4}, "build_all_s": [0.6, 0.61, 0.62]}


def test_calls_of_several_lengths_are_compared_by_their_tokens() -> None:
    assert judged(calls=trace_calls(), **TRACE).verdict == "ok"


@pytest.mark.parametrize("arm", [BASELINE, ALONE])
def test_noise_of_what_an_arm_is_compared_with_is_not_the_arms(arm: str) -> None:
    assert judged(calls=trace_calls(arm, range(1, 3), 1.6), **TRACE).verdict == "ok"


@pytest.mark.parametrize("arm", ["injected", "direct"])
def test_a_disturbed_arm_of_a_trace_is_noticed(arm: str) -> None:
    verdict = judged(calls=trace_calls(arm, range(1, 4), 1.5), **TRACE)
    assert verdict.verdict != "ok" and f"the {arm} arm was disturbed" in (verdict.reason or "")


DOUBTS: dict[str, dict[str, Any]] = {
    "the build took 4.1 s, and the direct arm computes more": {"build_all_s": [4.0, 4.1, 4.2]},
    "the injected arm drifted by -16% against the direct arm": {
        "calls": [
            dataclasses.replace(call, **drifting(call)) if call.arm == "injected" else call for call in sound_calls()
        ]
    },
    "the hardware's limit is 0": {"figures": {"direct_limit_s": 0.0}},
    "the calibrated flop_per_s is 2 times the data sheet's": {
        "row": {"conditions": {"data_sheet": {"flop_per_s": 1e12}, "rates": {"flop_per_s": 2e12}}}
    },
    "3 pairs give no interval": {"calls": [call for call in sound_calls() if call.round < 3]},
    "the direct arm was disturbed": {
        "calls": disturbed("direct", range(0, ROUNDS, 2), 0.5),
        "figures": {"direct_limit_s": 0.4},
    },
    "for the work of build and injected arm": {"build_all_s": [0.3, 0.3, 0.8]},
    "the build was measured 1 times": {"build_all_s": [0.8]},
    "the calibrated rates are not plausible": {"figures": {"direct_limit_s": 0.08}},
    "too noisy to tell": {"calls": disturbed(BASELINE, range(2, ROUNDS), 0.8)},
}


@pytest.mark.parametrize("reason", DOUBTS)
def test_a_doubt_gives_no_verdict(reason: str) -> None:
    verdict = judged(**DOUBTS[reason])
    assert verdict.verdict == "undecided" and reason in verdict.reason


def test_a_row_of_older_rules_is_not_judged_by_these() -> None:
    assert judge(ttft_row(), TTFTPayload(**{**BARE})).verdict == "undecided"


BARE = dict(
    build_s=1.0,
    kv_bytes=1,
    kv_ttft_s=0.1,
    direct_ttft_s=1.0,
    kv_user_ttft_s=0.1,
    direct_user_ttft_s=1.0,
    speedup_pct=90.0,
    cached_tokens=1,
)


@cache
def findings() -> list[Finding]:
    return validate_published(KNOWN)


def failing(rule: str) -> set[tuple[str, str, str, str]]:
    return {(f.row.model, f.row.hardware, f.row.context, f.row.query) for f in findings() if f.rule == rule}


def test_published_rows_that_beat_the_hardware() -> None:
    """2,000 + 4,000 tokens in 99 ms is the known case; only the rows of 72B on 4 × H800 beat their hardware."""
    found = failing("limit")
    assert ("Qwen2.5-72B", "H800 (4 GPUs)", "2,000", "4,000") in found
    assert {(model, hardware) for model, hardware, _, _ in found} == {("Qwen2.5-72B", "H800 (4 GPUs)")}
    assert len(found) == 9


def test_published_rows_whose_direct_arm_is_too_slow() -> None:
    found = failing("slow_direct")
    assert ("Qwen3-8B", "not stated", "long", "short") in found
    assert {model for model, *_ in found} == {"Qwen3-8B", "Qwen2.5-72B"}
    assert not {cell for cell in found if cell[1] != "not stated"}


def test_published_rows_where_the_larger_model_is_faster() -> None:
    found = failing("larger_is_faster")
    assert {(model, hardware) for model, hardware, _, _ in found} == {("Qwen3-8B", "not stated")}
    assert len(found) == 9


def test_every_stated_hardware_of_the_published_tables_has_a_card() -> None:
    stated = {row.hardware for row in KNOWN} - {published.NOT_STATED}
    cards = {hardware: hardware_card(hardware) for hardware in stated}
    assert {hardware: card and card.gpus for hardware, card in cards.items()} == {
        "4090 (2 Nodes 16 GPUs)": 16,
        "4090 (1 Nodes 8 GPUs)": 8,
        "H800 (4 GPUs)": 4,
        "H800 (2 GPUs)": 2,
    }
    assert hardware_card(published.NOT_STATED) is None
