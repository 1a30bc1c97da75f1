"""The scenario kv_vs_direct: wrong calibrations, merges, and a hybrid."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from experiments.bench import comparison
from experiments.bench.bench import Bench
from experiments.config import compose
from experiments.measurement import ttft
from experiments.performance_model.roofline import Roofline
from experiments.results import ttft_of
from tests.helpers.architectures import tiny_architecture

KNOBS = ["experiment=smoke", "sink=none", "hardware.check=false", "scenario.pairs=6"]
FAR_TOO_LOW = 1e3
"""FLOP and bytes a second. The rate is so low that every arm is faster than the limit."""


def test_a_limit_calibrated_too_low_is_calibrated_again() -> None:
    config = compose.validate(compose.compose(KNOBS))
    bench = Bench.open(config)
    rates = dataclasses.replace(bench.roofline.rates, flop_per_s=FAR_TOO_LOW, bytes_per_s=FAR_TOO_LOW)
    bench.roofline = Roofline(rates, bench.backend.model_config)
    (cell,) = config.scenario.cells(bench)
    (row,) = config.scenario.measure(bench, cell)
    figures = ttft_of(row)
    assert figures is not None and figures.limit_s is not None and figures.limit_s < figures.kv_ttft_s
    assert "limit" not in row.verdict_reason
    assert row.conditions["rates"]["flop_per_s"] > FAR_TOO_LOW


def test_recalibrating_keeps_the_higher_of_each_rate() -> None:
    config = compose.validate(compose.compose(KNOBS))
    bench = Bench.open(config)
    mixed = dataclasses.replace(bench.roofline.rates, flop_per_s=1e30, bytes_per_s=FAR_TOO_LOW)
    bench.roofline = Roofline(mixed, bench.backend.model_config)
    bench.recalibrate()
    assert bench.roofline.rates.flop_per_s == 1e30, "the higher rate is kept"
    assert bench.roofline.rates.bytes_per_s > FAR_TOO_LOW


@pytest.mark.parametrize("memories", [1, 2])
def test_the_merge_counts_as_work_of_the_direct_arm(memories: int) -> None:
    """The direct arm takes 0.9 s, the build 0.3 s, the injected arm 0.1 s, and a fetch or a merge 0.5 s."""
    config = compose.validate(compose.compose([*KNOBS, f"workload.memories={memories}", "merge=ropeshift"]))
    bench = Bench.open(config)
    (cell,) = config.scenario.cells(bench)
    items = [bench.memory.extract(text) for text in cell.memories]
    bench.memory.add(items)
    ids = [item.kv_cache_id for item in items]
    tokens = bench.memory.get_cache(ids).tokens
    fast = ttft.injected(bench.memory, bench.backend, ids, cell.question)
    slow = ttft.direct(bench.backend, tokens, cell.question)
    answers = ttft.trace(bench.backend, slow.prompt, None, 1)
    kv = [dataclasses.replace(fast, engine_s=0.1, user_s=0.6, cache_s=0.5, started_s=2.0 * i) for i in range(6)]
    whole = [dataclasses.replace(slow, engine_s=0.9, user_s=0.9, started_s=2.0 * i + 1) for i in range(6)]
    row = comparison.compare(
        bench,
        "kv_vs_direct",
        cell,
        "injected",
        comparison.Measured({"injected": kv, "direct": whole}, {"injected": answers, "direct": answers}),
        items=items,
        builds_s=[0.3],
    )
    assert ("for the work of build" in row.verdict_reason) == (memories == 1)
    figures = ttft_of(row)
    assert figures is not None
    assert (figures.merge_s, figures.fetch_s) == ((None, 0.5) if memories == 1 else (0.5, None))


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "deepseek_v3"])
def test_a_hybrid_and_latent_attention_are_measured_and_graded(model_type: str, tmp_path: Path) -> None:
    """From a folder, as a user's own model. Both arms take about the same time, so that noise may leave it open."""
    tiny = tiny_architecture(model_type)
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    own = ["model.label=own", f"model.name={tmp_path}", "model.weights=pretrained"]
    config = compose.validate(compose.compose([*KNOBS, *own]))
    bench = Bench.open(config)
    (cell,) = config.scenario.cells(bench)
    (row,) = config.scenario.measure(bench, cell)
    figures = ttft_of(row)
    assert figures is not None and figures.evidence is not None
    assert row.verdict in ("ok", "undecided"), row.verdict_reason
    assert row.equality in ("bitwise", "tokens")
    assert figures.cached_tokens == cell.context_tokens
    assert figures.evidence.kv_off_reference is not None and figures.evidence.kv_tolerance is not None
    assert figures.evidence.kv_off_reference <= figures.evidence.kv_tolerance
