"""A quick look of one or two pairs: rows with their medians and no interval, in every table, plot and sink."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments import execution as runner
from experiments.config.compose import compose, validate
from experiments.measurement import statistics
from experiments.reporting import plots, tables
from experiments.reporting.tables import markdown
from experiments.results.row import Row
from experiments.results.run_dir import read_rows
from experiments.scenarios.injection_cost import InjectionCostPayload

TINY = [
    "model=tiny",
    "model.weights=random",
    "hardware.check=false",
    "workload=python_docs",
    "workload.context_tokens=[58]",
    "workload.query_tokens=[33]",
    "scenario.answer_tokens=4",
    "sink=wandb",
    "sink.mode=offline",
]
SCENARIOS = {
    "kv_vs_direct": ["scenario=kv_vs_direct", "scenario.beside_recipe=true"],
    "injection_cost": ["scenario=injection_cost", "backend=hf_graph", "scenario.decode_tokens=4"],
}


def run(run_dir: Path, *overrides: str) -> list[Row]:
    composed = compose([*TINY, *overrides])
    resolved = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(resolved, dict)
    return runner.run(validate(composed), run_dir, {str(key): value for key, value in resolved.items()}, [])


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_quick_look_has_rows_and_no_interval(
    scenario: str, pairs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("CACHE", "DATA", "ARTIFACT", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{folder}_DIR", str(tmp_path / "wandb_home"))
    rows = run(tmp_path, *SCENARIOS[scenario], f"scenario.pairs={pairs}")
    assert [row.error for row in rows if row.status != "done"] == []
    assert read_rows(tmp_path) == rows
    of_pairs = [row for row in rows if row.scenario == scenario]
    figures = [dataclasses.asdict(row.payload) for row in of_pairs if row.payload]
    intervals = [value for of_row in figures for key, value in of_row.items() if key.endswith("_interval")]
    assert intervals and set(intervals) == {None}
    for row in of_pairs:
        assert row.pairs == pairs
        if scenario == "injection_cost":
            assert isinstance(row.payload, InjectionCostPayload)
            assert row.payload.ttft_s > 0 and row.payload.ttft_low_s is row.payload.ttft_high_s is None
    for table in tables.tables(of_pairs):
        shown = [name for name in table.columns if name in ("96.9% interval", "ttft low", "ttft high")]
        assert (shown or scenario == "injection_cost") and not [
            name for name in table.columns if name.endswith(" interval") and name not in shown
        ]
        for line in table.lines:
            assert {line.cells[table.columns.index(name)] for name in shown} <= {"–"}
    assert "nan" not in markdown(rows).lower() and "None" not in markdown(rows)
    assert plots.draw(rows) and (tmp_path / "report.html").stat().st_size > 0
    (logged,) = (tmp_path / "wandb").glob("offline-run-*/files/media/table/rows*.json")
    assert len(json.loads(logged.read_text())["data"]) == len(rows)


def test_six_pairs_have_an_interval() -> None:
    ratio, interval = statistics.paired_ratio([1.0, 2.0, 4.0], [2.0, 2.0, 2.0])
    assert (ratio, interval) == (1.0, None)
    assert statistics.median_interval([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == (1.0, 6.0)
    assert statistics.speedup_interval([1.0] * 6, [2.0] * 6) == (50.0, 50.0)
    low, high = statistics.speedup_interval([1.0, 1.2, 1.1, 1.0, 1.3, 1.1], [2.0] * 6) or (0.0, 0.0)
    assert low < statistics.speedup_pct([1.0, 1.2, 1.1, 1.0, 1.3, 1.1], [2.0] * 6) < high
