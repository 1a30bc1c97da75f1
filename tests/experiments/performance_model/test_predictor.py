"""The predictor: every published cell, the error on measured cells, break-even lengths and fleets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from experiments.config.compose import CONF, compose, validate
from experiments.execution.runner import run
from experiments.hardware.layout import CARDS, read_card
from experiments.performance_model.calibration import datasheet
from experiments.performance_model.fit import Fit, fit_engine, points_of
from experiments.performance_model.fleet import Tier, break_even_tokens, gain_s, size_fleet
from experiments.performance_model.predictor import Engine, Layout, Prefill
from experiments.performance_model.roofline import Roofline
from experiments.results import published
from experiments.results.row import Row
from experiments.results.run_dir import read_run
from experiments.scenarios.predict import Predict, shape_of
from kvmem.errors import ConfigError
from kvmem.models import loading
from tests.helpers.rows import ttft_row

REFERENCE = CONF.parent / "outputs/reference"
ENGINE = Engine()


def layout(model: str = "qwen3-8b", hardware: str = "h100") -> Layout:
    return Layout(shape_of(model), read_card(CARDS / f"{hardware}.yaml"))


def fitted_on(name: str, seed: int = 0) -> Fit:
    return fit_engine(list(Predict(fit_from=[str(REFERENCE / name)]).measured_points()), seed)


@pytest.mark.parametrize(("new", "cached"), [(167, 583), (953, 6064), (7017, 0), (1, 100_000)])
@pytest.mark.parametrize("hardware", ["h100", "h100x2", "h800x4"])
def test_no_prediction_beats_the_limit(new: int, cached: int, hardware: str) -> None:
    here = layout("qwen3-32b", hardware)
    limit = Roofline(datasheet(here.hardware, "bfloat16"), loading.shape_config("qwen3-32b"))
    perfect = Engine(1.0, 1.0, 1.0, 1.0, 1.0, fixed_s=0.0)
    assert here.ttft_s(Prefill(new, cached), perfect) >= 0.97 * limit.limit_s(new, cached)
    assert here.ttft_s(Prefill(new, cached), ENGINE) > limit.limit_s(new, cached)


def test_more_ranks_speed_up_one_request_and_a_pipeline_does_not() -> None:
    direct = Prefill(4000, 0)
    times = {name: layout("qwen2.5-72b", name).ttft_s(direct, ENGINE) for name in ("h800x2", "h800x4", "4090x16")}
    assert times["h800x4"] < times["h800x2"] < times["4090x16"]
    half = dataclasses.replace(layout("qwen2.5-72b", "4090x16").hardware, nodes=1, gpus=8, pipeline_parallel=1)
    one_node = dataclasses.replace(layout("qwen2.5-72b", "4090x16"), hardware=half)
    assert times["4090x16"] > one_node.ttft_s(direct, ENGINE)


def test_a_fit_recovers_the_engine_that_made_the_rows() -> None:
    truth = Engine(products=0.6, attention=0.3, bandwidth=0.7, fixed_s=0.005)
    rows: list[Row] = []
    for context in (500, 2000, 6000):
        for query in (16, 200, 1000):
            times = layout().ttft_s(Prefill(query, context), truth), layout().ttft_s(Prefill(context + query, 0), truth)
            rows.append(
                ttft_row(
                    context_tokens=context,
                    query_tokens=query,
                    cached_tokens=context,
                    tier="cuda",
                    kv_ttft_s=times[0],
                    direct_ttft_s=times[1],
                )
            )
    found = fit_engine([point for row in rows for point in points_of(row, layout())])
    assert len({point.cell for point in found.fitted}) == 5 and len({point.cell for point in found.held_out}) == 4
    assert max(map(abs, found.errors(found.held_out))) < 0.02
    assert found.engine.products == pytest.approx(0.6, rel=0.05)
    assert found.engine.fixed_s == pytest.approx(0.005, rel=0.1)


def test_a_memory_shorter_than_a_block_is_predicted_as_computed() -> None:
    """An engine that reuses only whole blocks reuses nothing of a memory that is shorter than a block."""
    cold, hit = (points_of(ttft_row(12, 200, cached_tokens=cached), layout())[0] for cached in (0, 12))
    assert (cold.prefill, hit.prefill) == (Prefill(212, 0), Prefill(200, 12))


@pytest.mark.parametrize("name", ["prefix_reuse_qwen3_8b_h100", "vllm_ttft_qwen3_32b_h100x2"])
def test_vllms_other_cells_are_predicted_within_30_percent(name: str) -> None:
    for seed in range(3):
        found = fitted_on(name, seed)
        assert not {p.cell for p in found.fitted} & {p.cell for p in found.held_out}
        assert len(found.held_out) == 24
        assert max(map(abs, found.errors(found.held_out))) < 0.30


def test_the_fast_engines_other_cells_are_predicted_within_15_percent() -> None:
    """The seed is that of scenario=predict. Both arms are predicted: with an injected memory, and the whole prompt."""
    found = fitted_on("injection_cost_qwen3_8b_h100", 0)
    assert {point.arm for point in found.held_out} == {"direct", "in place + graph"}
    assert not {p.cell for p in found.fitted} & {p.cell for p in found.held_out}
    assert max(map(abs, found.errors(found.held_out))) < 0.15


def test_a_fit_needs_cells_and_a_layout_with_rates() -> None:
    with pytest.raises(ConfigError, match="at least four measured cells"):
        fit_engine(points_of(ttft_row(kv_ttft_s=0.01, direct_ttft_s=0.02), layout()))
    with pytest.raises(ConfigError, match="the hardware 'local' has none"):
        fitted_on("default_smollm2_cpu")


def test_the_break_even_length_of_loading() -> None:
    resident, host, slow = Tier("GPU", None, 0.0), Tier("host", 55, 2e-5), Tier("far", 0.01, 1.0)
    tokens = break_even_tokens(layout(), ENGINE, host, 167)
    assert tokens is not None and tokens > 1
    assert gain_s(layout(), ENGINE, host, tokens, 167) > 0 >= gain_s(layout(), ENGINE, host, tokens - 1, 167)
    nearest = break_even_tokens(layout(), ENGINE, resident, 167)
    assert nearest is not None and nearest <= tokens
    assert break_even_tokens(layout(), ENGINE, slow, 167) is None


def test_the_needs_of_a_fleet() -> None:
    knobs = dict(requests_per_s=100.0, memories=1000, memory_tokens=6064, query_tokens=167)
    far = Tier("network", 12.5, 1e-3)
    half = size_fleet(layout(), ENGINE, far, local_share=0.5, **knobs)  # type: ignore[arg-type]
    none = size_fleet(layout(), ENGINE, far, local_share=0.0, **knobs)  # type: ignore[arg-type]
    measured_kv_bytes = 894_173_184  # of a memory of 6064 tokens
    assert half.storage_tb == pytest.approx(1000 * measured_kv_bytes / 1e12, rel=0.01)
    assert none.network_gb_per_second == pytest.approx(2 * half.network_gb_per_second)
    assert half.replicas_injected < none.replicas_injected < none.replicas_direct


def test_a_plan_on_a_layout_that_does_not_hold_the_model_is_refused(tmp_path: Path) -> None:
    overrides = ["scenario=predict", "sink=none", "hardware=h100", "scenario.plan_model=qwen2.5-72b"]
    rows = run(validate(compose(overrides)), tmp_path, {"backend": {}}, overrides)
    refused = [row for row in rows if row.status == "failed"]
    assert [row.scenario for row in refused] == ["break-even lengths", "fleet"]
    assert all("qwen2.5-72b does not fit hardware=h100" in row.error for row in refused)


def test_a_nan_fails_its_cell_and_not_the_run(tmp_path: Path) -> None:
    class OneNaN(Predict):
        def measure(self, bench: Any, cell: Any) -> list[Row]:
            rows = super().measure(bench, cell)
            if cell.label != "fleet":
                return rows
            assert rows[0].payload is not None
            return [dataclasses.replace(rows[0], payload=dataclasses.replace(rows[0].payload, storage_tb=float("nan")))]

    overrides = ["scenario=predict", "sink=none", "hardware=h100"]
    config = dataclasses.replace(validate(compose(overrides)), scenario=OneNaN())
    rows = run(config, tmp_path, {"backend": {}}, overrides)
    assert [row.scenario for row in rows if row.status == "failed"] == ["fleet"] and len(rows) > 75
    assert read_run(tmp_path).rows == tuple(rows) and (tmp_path / "report.html").is_file()


def test_the_scenario_names_all_published_cells_and_needs_no_model(tmp_path: Path) -> None:
    overrides = ["scenario=predict", "sink=none", "model=qwen2_5_72b", "model.weights=random"]
    rows = run(validate(compose(overrides)), tmp_path, {"backend": {}}, overrides)
    cells = [row for row in rows if row.scenario == "predict"]
    assert len(cells) == len(published.tables()) == 27 + 48
    impossible = [row for row in cells if row.payload.published_beyond_its_hardware != "no"]
    assert len(impossible) == 9 and {row.hardware for row in impossible} == {"h800x4"}
    assert all(row.status == "done" for row in rows)
    text = (tmp_path / "table.md").read_text()
    assert "error of the published cells" in text and "a fleet" in text
    assert read_run(tmp_path).rows == tuple(rows)


def test_a_fit_on_one_model_and_gpu_predicts_another_model_on_another_gpu() -> None:
    unseen = list(Predict(fit_from=[str(REFERENCE / "injection_cost_qwen3_32b_h200")]).measured_points())
    assert len(unseen) == 8
    for seed in range(4):
        assert max(map(abs, fitted_on("injection_cost_qwen3_8b_h100", seed).errors(unseen))) < 0.15
