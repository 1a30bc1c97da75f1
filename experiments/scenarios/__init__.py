"""Scenarios: one question in each file. A scenario turns the cells of a run into rows."""

from experiments.scenarios.base import Scenario

__all__ = ["Scenario"]
