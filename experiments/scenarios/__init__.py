"""Scenarios. A scenario is a question that a run answers: it measures the cells of the run, and returns rows.

Each scenario is one file in this package, with a card in conf/scenario. `SCENARIOS` finds it by name.
"""

from experiments.scenarios.base import SCENARIOS, Labelled, ModelScenario, Scenario

__all__ = ["SCENARIOS", "Labelled", "ModelScenario", "Scenario"]
