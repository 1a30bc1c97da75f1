"""The question and the answer that head a report, from the scenario that its rows name."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.results import Row
from experiments.scenarios import SCENARIOS


def question(rows: Sequence[Row]) -> str:
    """The question of the first row's scenario; "" if no scenario has that name."""
    scenario = SCENARIOS.classes().get(rows[0].scenario) if rows else None
    return scenario.question if scenario else ""


def answer(rows: Sequence[Row]) -> str:
    """The answer that the first row's scenario reads from its valid rows; "" if it reads none."""
    scenario = SCENARIOS.classes().get(rows[0].scenario) if rows else None
    valid = [row for row in rows if row.scenario == rows[0].scenario and row.verdict == "ok"]
    return scenario.answer(valid) if scenario and valid else ""
