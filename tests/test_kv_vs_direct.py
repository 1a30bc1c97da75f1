"""The scenario on a bench of its own: what happens when the limit was read wrongly."""

from __future__ import annotations

import dataclasses

from experiments import compose
from experiments.bench import Bench
from experiments.roofline import Roofline

KNOBS = ["experiment=smoke", "sink=none", "hardware.check=false", "scenario.pairs=3"]
FAR_TOO_LOW = 1e3
"""FLOP and bytes a second: any arm beats the limit that follows."""


def test_a_limit_that_was_read_too_low_is_calibrated_anew() -> None:
    config = compose.validate(compose.compose(KNOBS))
    bench = Bench.open(config)
    rates = dataclasses.replace(bench.roofline.rates, flop_per_s=FAR_TOO_LOW, bytes_per_s=FAR_TOO_LOW)
    bench.roofline = Roofline(rates, bench.backend.model_config)
    (cell,) = config.scenario.cells(bench)
    (row,) = config.scenario.measure(bench, cell)
    assert row.limit_s is not None and row.kv_ttft_s is not None and row.limit_s < row.kv_ttft_s
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
