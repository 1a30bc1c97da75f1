"""Scenarios, one question in each file: a scenario turns the cells of a run into rows and answers its question.

A new scenario is one new file in this package, with its card in conf/scenario. `SCENARIOS` finds it by name.
"""

from experiments.scenarios.base import SCENARIOS, Labelled, ModelScenario, Scenario

__all__ = ["SCENARIOS", "Labelled", "ModelScenario", "Scenario"]
