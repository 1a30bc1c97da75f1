"""docs/experiments/verdict.md names every rule, doubt and bound of the code, and only planted faults that exist."""

from __future__ import annotations

import re
from pathlib import Path

from experiments.measurement import statistics, verdict
from tests.mutations.catalogue import MUTATIONS

PAGE = (Path(__file__).parents[3] / "docs/experiments/verdict.md").read_text(encoding="utf-8")


def _rows(start: str, end: str) -> dict[str, list[str]]:
    """The lines of the tables between two headings, by the name in their first cell."""
    section = PAGE[PAGE.index(f"\n## {start}\n") : PAGE.index(f"\n## {end}\n")]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {cells[0].strip("`"): cells[1:] for cells in lines if cells[0].startswith("`")}


def test_the_page_tells_every_rule_and_every_doubt() -> None:
    assert set(_rows("The rules", "The doubts")) == {rule.__name__ for rule in verdict.RULES}
    assert set(_rows("The doubts", "The bounds")) == {doubt.__name__ for doubt in verdict.DOUBTS}


def test_the_page_names_planted_faults_of_every_kind_and_no_other() -> None:
    rows = {**_rows("The rules", "The doubts"), **_rows("The doubts", "The bounds")}
    told = [cells[1] for cells in rows.values()] + re.findall(r"\(planted: (.*?)\)", PAGE)
    told += re.findall(r"\n### (?:Traces and loads|Files)\n(.*?)(?=\n##)", PAGE, re.DOTALL)
    named = {fault for text in told for fault in re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", text)}
    kinds = {mutation.name: mutation.kind for mutation in MUTATIONS}
    assert named - kinds.keys() == set()
    assert {kinds[fault] for fault in named} == set(kinds.values())
    assert [rule for rule in verdict.RULES if not re.search(r"\*[^*]+\*", rows[rule.__name__][1])] == []


def test_the_page_states_every_bound_as_the_code_has_it() -> None:
    stated = {name: float(cells[0]) for name, cells in _rows("The bounds", "Rounding").items()}
    numbers = {name: value for name, value in vars(verdict).items() if isinstance(value, int | float)}
    bounds = {name: value for name, value in numbers.items() if name not in ("ROUNDING", "RULES_VERSION")}
    assert {"BATCHES", "NOISY_SPREAD"} <= bounds.keys() & vars(statistics).keys()
    assert stated == bounds
