"""The verdict: every rule fails for its own reason, and the published rows that are known to fail do fail."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from experiments.measurement.verdict import Finding, hardware_card, validate_cell, validate_published
from experiments.results import published

KNOWN = [row for row in published.tables() if row.table in ("huggingface_ttft", "vllm_ttft")]

SOUND: dict[str, Any] = {
    "direct_digest": "a",
    "injected_digest": "a",
    "cached_tokens": 583,
    "expected_tokens": 583,
    "kv_ttft_s": 0.2,
    "direct_ttft_s": 1.0,
    "kv_limit_s": 0.1,
    "direct_limit_s": 0.8,
    "build_s": 0.8,
    "equality": "tokens",
    "exact": True,
}

BROKEN = {
    "token ids": {"injected_digest": "b"},
    "0 tokens came from the cache, 583 were expected": {"cached_tokens": 0},
    "600 tokens came from the cache": {"cached_tokens": 600},
    "the injected arm took 200 ms, and the hardware needs 201 ms": {"kv_limit_s": 0.201},
    "the direct arm took 1000 ms, and the hardware needs 1100 ms": {"direct_limit_s": 1.1},
    "direct baseline is too slow": {"build_s": 0.63},
    "diverge": {"equality": "diverged"},
}


def test_a_sound_cell_is_ok() -> None:
    verdict = validate_cell(**SOUND)
    assert (verdict.verdict, verdict.reason) == ("ok", "")
    assert validate_cell(**SOUND | {"equality": "near_tie"}).verdict == "ok"
    assert validate_cell(**SOUND | {"build_s": 0.64}).verdict == "ok"  # the direct time is 1.19 times their sum


def test_a_merge_counts_as_work_of_the_direct_arm() -> None:
    """Times of four memories of 1,024 tokens in total on a CPU, merged with RopeShift."""
    assert validate_cell(**SOUND | {"build_s": 0.5}).verdict == "invalid"
    assert validate_cell(**SOUND | {"build_s": 0.5, "merge_s": 0.14}).verdict == "ok"
    reason = validate_cell(**SOUND | {"build_s": 0.5, "merge_s": 0.12}).reason
    assert reason.endswith("1 s for the work of build, merge and injected arm, which took 0.5 + 0.12 + 0.2 s")


@pytest.mark.parametrize("reason", BROKEN)
def test_each_rule_fails_for_its_own_reason(reason: str) -> None:
    verdict = validate_cell(**SOUND | BROKEN[reason])
    assert verdict.verdict == "invalid"
    assert reason in verdict.reason
    assert ";" not in verdict.reason


def test_every_reason_is_listed() -> None:
    verdict = validate_cell(**SOUND | {"injected_digest": "b", "cached_tokens": 0, "kv_limit_s": 1.0, "build_s": 0.1})
    assert verdict.reason.count("; ") == 3


def test_divergence_is_accepted_for_a_merge_that_is_not_exact() -> None:
    verdict = validate_cell(**SOUND | {"equality": "diverged", "exact": False})
    assert verdict.verdict == "ok"
    assert "this merge is not exact" in verdict.reason


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
