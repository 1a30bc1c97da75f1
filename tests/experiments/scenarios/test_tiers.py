"""The tiers scenario at a tiny size: a row for each tier, and figures that add up."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from experiments.bench.bench import Bench
from experiments.config import compose
from experiments.execution.runner import problems
from experiments.measurement import page_cache
from experiments.reporting import tables
from experiments.scenarios.tiers import LengthTimes, break_even_tokens
from kvmem.cache import KVCacheItem
from kvmem.scheduler.cost_model import Costs
from kvmem.tiers.tiered_cache import TieredCache

TINY = ["model=tiny", "model.weights=random", "scenario=tiers", "scenario.repeats=6", "hardware.check=false"]


def test_each_tier_has_a_row(tmp_path: Path) -> None:
    overrides = [*TINY, f"scenario.folder={tmp_path}", "scenario.context_tokens=[64,256]"]
    on = Bench.open(compose.validate(compose.compose(overrides)))
    (cell,) = on.setup.scenario.cells(on)
    rows = on.setup.scenario.measure(on, cell)
    assert [row.arm for row in rows] == ["ram", "disk, warm", "disk, cold", "disk_int8", "disk_int4", "recompute"] * 2
    exact = [row for row in rows if not row.payload.lossy]
    assert {row.verdict for row in rows} <= {"ok", "undecided"} and {row.equality for row in exact} <= {
        "bitwise",
        "tokens",
    }
    assert [row.context_tokens for row in rows] == [64] * 6 + [256] * 6
    for row in rows:
        assert row.payload.ttft_s > 0 and len(row.payload.ttft_all_s) == 6
        assert (row.payload.of_read_pct is not None) == row.arm.startswith("disk,")
        assert (row.payload.over_resident == 1) or row.arm != "ram"
    for resident, int8, int4 in ((rows[i], rows[i + 3], rows[i + 4]) for i in (0, 6)):
        assert resident.payload.kv_bytes > 3 * int8.payload.kv_bytes > 3 * int4.payload.kv_bytes
        assert (int8.payload.lossy, int4.payload.lossy) == ("int8", "int4")
        assert {int8.equality, int4.equality}.isdisjoint({"bitwise", None})
        off = [abs(row.payload.nll - resident.payload.nll) for row in (int8, int4)]
        # With random weights the errors have either sign, so int4 need not be farther off than int8.
        assert all(0 < difference < 2 for difference in off)
    assert not problems(rows, exact=True), "a reported loss is not a failure"
    assert tables.tables(rows) and list(tmp_path.iterdir()) == [], "the scenario removes its files"


def test_a_short_bf16_memory_is_larger_when_quantized(tmp_path: Path) -> None:
    """72 tokens take two groups of 64, so the quantized memory is larger. It still fits the tier."""
    overrides = [*TINY, f"scenario.folder={tmp_path}", "scenario.context_tokens=[72,80]", "backend.dtype=bfloat16"]
    on = Bench.open(compose.validate(compose.compose(overrides)))
    (cell,) = on.setup.scenario.cells(on)
    rows = {row.arm: row.payload for row in on.setup.scenario.measure(on, cell) if row.context_tokens == 72}
    assert rows["disk_int8"].kv_bytes > rows["ram"].kv_bytes > rows["disk_int4"].kv_bytes


def test_tensors_that_come_back_changed_are_invalid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [*TINY, f"scenario.folder={tmp_path}", "scenario.context_tokens=[64,96]"]
    on = Bench.open(compose.validate(compose.compose(overrides)))
    put = TieredCache.put

    def put_changed(self: TieredCache, item: KVCacheItem, tier: str) -> None:
        stored = copy.deepcopy(item)
        if tier == "ram":
            stored.kv_cache.layers[0].keys.view(-1)[0] += 1
        put(self, stored, tier)

    monkeypatch.setattr(TieredCache, "put", put_changed)
    (cell,) = on.setup.scenario.cells(on)
    rows = on.setup.scenario.measure(on, cell)
    assert "ok" not in {row.verdict for row in rows if row.arm != "recompute"}
    assert rows[0].verdict == "invalid" and "the tensors from ram" in rows[0].verdict_reason
    assert "made from those of ram, which is invalid" in rows[1].verdict_reason


def test_a_dropped_file_is_not_in_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8 << 20))
    buffer = bytearray(page_cache.BLOCK_BYTES)
    assert page_cache.read_s(path, buffer) > 0 and page_cache.resident_pct(path) == 100
    page_cache.drop(path)
    assert page_cache.resident_pct(path) < 20


def test_the_break_even_is_where_the_lines_cross() -> None:
    costs = Costs(0.01, 0.001, 0.0, 100)  # each of a memory's tokens saves 1 ms

    def length(tokens: int, fixed_s: float, token_s: float) -> LengthTimes:
        seconds = {"ram": [0.05], "disk": [0.05 + fixed_s + token_s * tokens], "recompute": [0.05 + tokens * 0.001]}
        return LengthTimes(tokens, 40, 100 * tokens, seconds)

    slow_start = [length(100, 0.0302, 0.0004), length(300, 0.0302, 0.0004)]
    assert break_even_tokens(costs, slow_start, "disk") == 51  # 0.0302 + 0.0004 n = 0.001 n at 50.3
    assert break_even_tokens(costs, slow_start, "ram") == 1
    slow = [length(100, 0.0, 0.002), length(300, 0.0, 0.002)]
    assert break_even_tokens(costs, slow, "disk") is None
