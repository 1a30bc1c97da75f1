"""Searches of under_load: how far they go, and what a stored row says of theirs."""

from __future__ import annotations

import dataclasses

import pytest

from experiments.config.compose import CONF
from experiments.results import read_rows
from experiments.scenarios.under_load import ArmCell, UnderLoad, UnderLoadPayload

REFERENCE = CONF.parent / "outputs/reference/under_load_qwen3_8b_h100"


@pytest.fixture(scope="module")
def searched() -> UnderLoadPayload:
    """A stored row whose search has tried 38.3 a second, which passed, and 46.0, 55.2 and 79.5, which did not."""
    payload = read_rows(REFERENCE)[0].payload
    assert isinstance(payload, UnderLoadPayload) and payload.sustained_a_second == pytest.approx(38.3, abs=0.1)
    return payload


def test_a_row_that_does_not_store_its_search_bounds_is_not_said_to_have_reached_one(
    searched: UnderLoadPayload,
) -> None:
    assert searched.search_bounds is None and searched.remarks() == []
    assert dataclasses.replace(searched, search_bounds=(1.0, 100.0)).remarks() == []
    (remark,) = dataclasses.replace(searched, search_bounds=(1.0, searched.sustained_a_second)).remarks()
    assert remark == "the search ended at its highest rate, 38.34 requests a second"


def test_a_search_that_ended_between_rates_that_are_no_neighbours_is_found(searched: UnderLoadPayload) -> None:
    row = read_rows(REFERENCE)[0]
    assert searched.failures(row) == []
    without = [probe for probe in searched.probes if not 40 < probe.rate < 50]
    assert "ended between 38.34 and 55.21" in str(dataclasses.replace(searched, probes=without).failures(row))


@pytest.mark.parametrize("search_from", [None, 1000.0])
def test_a_search_ends_where_all_requests_arrive_within_twice_the_goal(search_from: float | None) -> None:
    scenario = UnderLoad(requests=16, goal_ttft_s=0.2, search_step=1.5, search_from=search_from)
    first, lowest, highest = scenario._exponents(ArmCell("text", 256, 32, 0.1, 0.2, (), ()))
    assert 1.5**highest <= 16 / (2 * 0.2) < 1.5 ** (highest + 1)
    assert lowest < first <= highest
