"""One policy, one file: which text memories are worth their bytes as KV."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np

from kvmem.registry import Registry
from kvmem.scheduler.usage import UsageTable


class Policy(ABC):
    """Ranks the memories; the planner keeps them in that order as far as the budgets go."""

    name: ClassVar[str]

    @abstractmethod
    def scores(self, table: UsageTable, held: np.ndarray) -> np.ndarray:
        """(rows,): the higher, the sooner it is kept; 0 or less: not kept. `held`: (rows,), True where KV is stored."""

    def rank(self, table: UsageTable, held: np.ndarray, budget_bytes: float) -> np.ndarray:
        """Rows in the order in which they are kept, best first; a row left out is not kept."""
        scores = self.scores(table, held)
        order = np.argsort(-scores, kind="stable")
        return order[scores[order] > 0]

    def observed(self, table: UsageTable, row: int) -> None:  # noqa: B027 - most policies learn nothing of their own
        """A use of `row`, called before the table counts it."""

    def state(self) -> dict[str, Any]:
        """What the policy has learned of its own, as plain values."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:  # noqa: B027 - see above
        """Takes back what `state` gave."""

    def explain(self, table: UsageTable, row: int, held: bool) -> str:
        """The numbers behind the score of `row`, as a clause."""
        mask = np.zeros(len(table), dtype=bool)
        mask[row] = held
        return f"{self.name} score {self.scores(table, mask)[row]:.4g}"


POLICIES = Registry(Policy, "kvmem.scheduler.policies", "policy")


def policy_classes() -> dict[str, type[Policy]]:
    """Every policy by its name."""
    return POLICIES.classes()


def policy(name: str) -> Policy:
    """The policy called `name` (case does not matter), with its default knobs."""
    return POLICIES.find(name)()
