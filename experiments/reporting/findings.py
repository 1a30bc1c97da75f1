"""The question and the answer that head a report, from the scenario that its rows name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from experiments.results import GRADES, SAME, Row, formatting, is_prediction
from experiments.scenarios import SCENARIOS


def question(rows: Sequence[Row]) -> str:
    """The question of the first row's scenario; "" if no scenario has that name."""
    scenario = SCENARIOS.classes().get(rows[0].scenario) if rows else None
    return scenario.question if scenario else ""


def answer(rows: Sequence[Row]) -> str:
    """The answer that the first row's scenario reads from its valid or predicted rows; "" if it reads none.

    Before it stands in how many of them the output is the same, for a time says nothing without that.
    """
    scenario = SCENARIOS.classes().get(rows[0].scenario) if rows else None
    valid = [row for row in rows if row.scenario == rows[0].scenario and (row.verdict == "ok" or is_prediction(row))]
    found = scenario.answer(valid) if scenario and valid else ""
    return f"{_outputs(valid)}{found}" if found else ""


def _outputs(rows: Sequence[Row]) -> str:
    grades = Counter(row.equality for row in rows if row.equality is not None)
    if not grades:
        return ""
    same = f"{sum(grades[grade] for grade in SAME)} of {formatting.plural(grades.total(), 'row')}"
    others = [f"{grades[grade]} {name}" for grade, name in GRADES.items() if grade not in SAME and grades[grade]]
    return f"The answer is the same in {', '.join([same, *others])}. "
