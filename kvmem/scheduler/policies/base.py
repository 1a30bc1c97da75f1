"""The interface of a policy: which text memories are worth their bytes as KV. One policy in each file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np

from kvmem.registry import Registry
from kvmem.scheduler.usage import UsageTable


class Policy(ABC):
    """Ranks the memories. The planner keeps them in that order as far as the budgets allow."""

    name: ClassVar[str]

    @abstractmethod
    def scores(self, table: UsageTable, held: np.ndarray) -> np.ndarray:
        """A score for each memory, (rows,): the highest is kept first, and 0 or less is not kept.

        held: (rows,), True if KV of the memory is stored.
        """

    def rank(self, table: UsageTable, held: np.ndarray, budget_bytes: float) -> np.ndarray:
        """The rows to keep, best first. A row that is left out is not kept."""
        scores = self.scores(table, held)
        order = np.argsort(-scores, kind="stable")
        return order[scores[order] > 0]

    def observed(self, table: UsageTable, row: int) -> None:  # noqa: B027 - most policies learn nothing of their own
        """Called for each use of `row`, before the table counts it."""

    def forgotten(self, table: UsageTable, row: int) -> None:  # noqa: B027 - see above
        """Called before `row` is removed from the table and later rows move up. Forgets what was learned of it."""

    def state(self) -> dict[str, Any]:
        """What the policy has learned beyond the table, as plain values."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:  # noqa: B027 - see above
        """The inverse of `state`. Raises KeyError, TypeError or ValueError for a state that is damaged."""

    def explain(self, table: UsageTable, row: int, held: bool) -> str:
        """The numbers behind the score of `row`, as a clause."""
        mask = np.zeros(len(table), dtype=bool)
        mask[row] = held
        return f"{self.name} score {self.scores(table, mask)[row]:.4g}"


POLICIES = Registry(Policy, "kvmem.scheduler.policies", "policy")


def policy_classes() -> dict[str, type[Policy]]:
    """All policies by name."""
    return POLICIES.classes()


def policy(name: str) -> Policy:
    """The policy called `name` (case is ignored) with its default settings. Raises ConfigError for an unknown name."""
    return POLICIES.find(name)()
