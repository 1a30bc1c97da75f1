"""What a scenario's file says of its rows: the question that it asks, and the answer in a sentence."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType

from experiments.results import Row


def question(rows: Sequence[Row]) -> str:
    """The first line of the first row's scenario; "" where there is no such file."""
    module = _file_of(rows)
    return ((module and module.__doc__) or "").strip().partition("\n")[0]


def answer(rows: Sequence[Row]) -> str:
    """What the scenario's `answer` makes of its rows that are ok; "" where it has none, or they tell none."""
    module = _file_of(rows)
    told = [row for row in rows if row.scenario == rows[0].scenario and row.verdict == "ok"]
    if module is None or not hasattr(module, "answer") or not told:
        return ""
    try:
        return module.answer(told)
    except KeyError:  # rows that another version left may lack a figure
        return ""


def _file_of(rows: Sequence[Row]) -> ModuleType | None:
    name = rows[0].scenario if rows else ""
    module = f"experiments.scenarios.{name}"
    if not name.isidentifier() or importlib.util.find_spec(module) is None:
        return None
    return importlib.import_module(module)
