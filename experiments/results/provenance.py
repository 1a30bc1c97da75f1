"""Under which code and on which machine the rows of a folder were measured, and whether that is one and the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from experiments.results.row import Row

SHARED_CONDITIONS = ("commit", "kvmem", "torch", "transformers", "vllm", "python", "cuda", "machine", "threads")
"""Conditions that all measured rows of one folder share."""


def measured_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows that a measurement made: neither failed ones nor simulated ones, which have no conditions."""
    return [row for row in rows if row.status != "failed" and row.conditions.keys() & set(SHARED_CONDITIONS)]


def different_conditions(rows: Sequence[Row]) -> dict[str, Counter[str]]:
    """The shared conditions of which `rows` have several values, and how many rows have each."""
    measured = measured_rows(rows)
    of_each = {name: Counter(str(row.conditions.get(name)) for row in measured) for name in SHARED_CONDITIONS}
    return {name: values for name, values in of_each.items() if len(values) > 1}
