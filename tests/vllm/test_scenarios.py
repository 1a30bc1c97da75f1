"""Scenarios on the shared engine: their counts, and the settings that they refuse."""

from __future__ import annotations

import pytest

from experiments.audit.figures import check_row, checked_as
from experiments.bench.bench import Bench
from experiments.config import compose
from experiments.measurement import ttft
from experiments.measurement.engine_adapters import engine_conditions
from experiments.performance_model.roofline import Rates, Roofline
from experiments.results import Row
from experiments.traces import NO_MEMORY
from kvmem.engines.vllm import Arrival, Limit
from kvmem.engines.vllm.backend import VLLMBackend
from kvmem.errors import ConfigError
from tests.vllm.conftest import on_engine

SLOWER_THAN_ANY = Rates(1e15, 1e15, "float32", "a limit that no arm of a test reaches")


def bench_on(engine: VLLMBackend, *overrides: str) -> Bench:
    chosen = [] if any(override.startswith("scenario=") for override in overrides) else ["scenario=prefix_reuse"]
    config = compose.validate(compose.compose(["backend=vllm", "sink=none", *chosen, *overrides]))
    memory = on_engine(engine)
    return Bench(config, memory, engine, Roofline(SLOWER_THAN_ANY, engine.model_config), engine_conditions(engine))


def test_prefix_reuse_counts_every_hit(engine: VLLMBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = ["scenario.pairs=1", "scenario.answer_tokens=4"]  # one pair has a ratio, and no interval
    bench = bench_on(engine, *knobs, "workload.context_tokens=[200]", "workload.query_tokens=[32]")
    (cell,) = bench.setup.scenario.cells(bench)
    injected, native = bench.setup.scenario.measure(bench, cell)
    assert (injected.arm, injected.payload.cached_tokens, injected.equality) == ("injected", 200, "tokens")
    assert (native.arm, native.payload.cached_tokens, native.equality) == (
        "native hit",
        128,
        "tokens",
    )  # one block of 128
    assert {injected.verdict, native.verdict} == {"undecided"}, "one pair gives no verdict"
    assert injected.payload.injected_over_native_hit > 0
    assert injected.payload.injected_over_native_hit_interval is injected.payload.speedup_interval is None

    monkeypatch.setattr(ttft, "fill_prefix_cache", lambda backend, token_ids, view=None: backend.reset())
    _, missed = bench.setup.scenario.measure(bench, cell)
    assert missed.verdict == "invalid" and "0 tokens came from the cache, 128 were expected" in missed.verdict_reason


def test_prefix_reuse_is_about_one_memory(engine: VLLMBackend) -> None:
    bench = bench_on(engine, "workload.memories=2")
    with pytest.raises(ConfigError, match="kv_vs_direct"):
        bench.setup.scenario.cells(bench)


def test_kv_vs_direct_takes_vllm_too(engine: VLLMBackend) -> None:
    bench = bench_on(
        engine,
        "scenario=kv_vs_direct",
        "workload=python_docs",
        "workload.context_tokens=[200]",
        "workload.query_tokens=[32]",
        "workload.memories=2",
        "scenario.pairs=2",
        "scenario.answer_tokens=4",
    )
    (cell,) = bench.setup.scenario.cells(bench)
    (row,) = bench.setup.scenario.measure(bench, cell)
    assert (row.backend, row.memories, row.payload.cached_tokens, row.equality) == ("vllm", 2, 128, "tokens")
    assert row.verdict == "undecided" and "2 pairs give no interval" in row.verdict_reason


def test_under_load_each_arm_reuses_what_it_says(engine: VLLMBackend) -> None:
    bench = bench_on(
        engine,
        "scenario=under_load",
        "scenario.memories=2",
        "scenario.memory_tokens=136",
        "scenario.requests=6",
        "scenario.pairs=1",
        "scenario.loads=[3.0]",
        "scenario.search=false",
        "scenario.new_tokens=2",
        "scenario.plain_share=0.2",
        "scenario.arms=[text,prefix_cache,injected_cold,lmcache]",
    )
    scenario = bench.setup.scenario
    rows = {cell.label: scenario.measure(bench, cell) for cell in scenario.cells(bench)}
    for row in (row for of_arm in rows.values() for row in of_arm):
        stored = Row.from_json(row.to_json())
        assert check_row(stored) == [] and checked_as(stored) == (
            "judged again" if row.arm != "LMCache" else "not measured"
        )
    (left_out,) = rows.pop("LMCache")
    assert left_out.verdict is None and "not installed" in left_out.verdict_reason
    for arm in rows.values():
        assert "invalid" not in [row.verdict for row in arm], arm[0].verdict_reason
        for figures in (row.payload for row in arm):
            assert figures.load == pytest.approx(3)
            assert 0 < figures.ttft_p50_s <= figures.ttft_p90_s <= figures.ttft_p99_s
            plain = [request for request in figures.runs[0].requests if request.memory == NO_MEMORY]
            assert plain and sum(request.cached_tokens for request in plain) == 0 < figures.plain_p99_s
    assert all(row.payload.local_pct == row.payload.injected_pct == 0 for row in rows["direct"])
    for native in rows["native hit"]:
        assert native.payload.local_pct > 0 and native.payload.injected_pct == 0
    for cold in rows["injected cold"]:
        assert cold.payload.injected_pct > 0
        used = {request.memory for request in cold.payload.runs[0].requests} - {NO_MEMORY}
        assert cold.payload.files_read == len(used)
        assert cold.payload.plain_p99_over > 0 and cold.payload.without_loads[0].files_read == 0


def test_a_load_that_is_too_much_is_given_up(engine: VLLMBackend) -> None:
    prompts = [engine.template.bare(f"{number}: What is a tuple?") for number in range(8)]
    arrivals = [Arrival(0.02 * number, prompt, None, 4) for number, prompt in enumerate(prompts)]
    arrivals.append(Arrival(60.0, prompts[0], None, 4))
    served = engine.serving.serve(arrivals, Limit(1e-4, 1, range(len(arrivals))))
    assert 2 <= len(served) < len(arrivals) and None in [one.answer for one in served]
    assert engine.generate("What is a tuple?", max_new_tokens=2).token_ids, "the engine goes on"


def test_restart_reads_the_file_once_on_a_fresh_engine(engine: VLLMBackend) -> None:
    bench = bench_on(
        engine, "scenario=restart", "scenario.memory_tokens=136", "scenario.pairs=1", "scenario.new_tokens=2"
    )
    (cell,) = bench.setup.scenario.cells(bench)
    (row,) = bench.setup.scenario.measure(bench, cell)
    assert row.verdict == "undecided" and "1 pairs give no interval" in row.verdict_reason, row.verdict_reason
    (fresh,) = row.payload.engines
    assert [fresh.first.files_read, *(load.files_read for load in fresh.warm)] == [1, 0]
    assert row.payload.first_over_text > 0 and row.payload.first_ttft_s == fresh.first.requests[0].first_token_s
    stored = Row.from_json(row.to_json())
    assert checked_as(stored) == "judged again" and check_row(stored) == []


@pytest.mark.parametrize("scenario", ["prefix_reuse", "under_load"])
def test_an_engine_without_a_prefix_cache_is_refused_by_name(scenario: str) -> None:
    config = compose.validate(compose.compose(["model=tiny", f"scenario={scenario}", "sink=none"]))
    with pytest.raises(ConfigError, match="backend=huggingface"):
        config.scenario.check(config)
