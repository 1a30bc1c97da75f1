"""A row of `tiers` is judged again from what it stores, and each rule for tiers has a row that breaks it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments import run_experiment
from experiments.audit.figures import check_row, checked_as
from experiments.bench import judged_again
from experiments.bench.quality import STATED_LOSSES
from experiments.results import Row
from experiments.scenarios.tiers import TiersPayload
from kvmem.tiers import BITS


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    folder = tmp_path_factory.mktemp("tiers")
    measured = run_experiment(
        *("model=tiny", "scenario=tiers", "scenario.context_tokens=[128,160]", "scenario.compressed=[disk_int8]"),
        *("hardware.check=false", "sink=none", "scenario.answer_tokens=4", f"scenario.folder={folder}"),
        out=folder / "run",
    )
    return {row.arm: Row.from_json(row.to_json()) for row in measured if row.context_tokens == 128}


def _with_evidence(row: Row, **changed: object) -> Row:
    assert isinstance(row.payload, TiersPayload) and row.payload.judged and row.payload.judged.evidence
    evidence = replace(row.payload.judged.evidence, **changed)  # type: ignore[arg-type]
    return judged_again(
        replace(row, payload=replace(row.payload, judged=replace(row.payload.judged, evidence=evidence)))
    )


def test_every_stored_row_can_be_judged_again(rows: dict[str, Row]) -> None:
    for row in rows.values():
        assert checked_as(row) == "judged again" and check_row(row) == []
        assert row.verdict != "invalid", row.verdict_reason


def test_the_recomputed_arm_is_judged_by_the_independent_forward_pass(rows: dict[str, Row]) -> None:
    row = rows["recompute"]
    assert isinstance(row.payload, TiersPayload) and row.payload.judged and row.payload.judged.evidence
    calls = row.payload.judged.evidence.calls
    slower = [
        replace(call, engine_s=call.engine_s * 3, user_s=call.user_s * 3) if call.arm == "recompute" else call
        for call in calls
    ]
    judged = _with_evidence(row, calls=slower)
    assert judged.verdict == "invalid" and "baseline is too slow" in judged.verdict_reason


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"kv_off": 0.06}, "a KV at most 0.05 off"),
        ({"kv_off": float("nan")}, "a KV at most 0.05 off"),
        ({"nll_above": 0.06}, "a loss of at most 0.05 nats"),
        ({"agreement_pct": 90.0}, "at least 95% of the next tokens"),
    ],
)
def test_a_loss_beyond_what_is_stated_is_invalid(rows: dict[str, Row], changed: dict[str, float], reason: str) -> None:
    row = replace(rows["disk_int8"], weights="pretrained")
    assert isinstance(row.payload, TiersPayload) and row.payload.judged and row.payload.judged.evidence
    loss = row.payload.judged.evidence.loss
    assert loss is not None
    judged = _with_evidence(row, loss=replace(loss, **changed))  # type: ignore[arg-type]
    assert judged.verdict == "invalid" and reason in judged.verdict_reason


def test_a_tier_whose_bytes_were_not_read_is_invalid(rows: dict[str, Row]) -> None:
    judged = _with_evidence(rows["disk, warm"], least_fetch_s=10.0)
    assert judged.verdict == "invalid" and "reading its bytes takes at least" in judged.verdict_reason


def test_a_tier_that_gives_back_other_bits_is_invalid(rows: dict[str, Row]) -> None:
    judged = _with_evidence(rows["disk, warm"], kv_off_built=1e-9)
    assert judged.verdict == "invalid" and "differ from the built ones" in judged.verdict_reason


def test_every_scheme_states_its_loss() -> None:
    assert STATED_LOSSES.keys() == BITS.keys()
