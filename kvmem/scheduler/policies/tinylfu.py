"""Evicts by recency and admits by frequency."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from kvmem.scheduler.policies.base import Policy
from kvmem.scheduler.usage import UsageTable


@dataclass(config=ConfigDict(extra="forbid"))
class TinyLFU(Policy):
    """A new memory replaces the least recently used ones only if it was used more often (Einziger et al. 2017).

    Counts are halved every `sample` uses, so that old uses count less. The paper counts in a sketch. Here counts are
    exact, because a text memory is large enough to afford one number.
    """

    sample: int = Field(1000, ge=1)

    name: ClassVar[str] = "tinylfu"

    def __post_init__(self) -> None:
        self._counts: dict[str, float] = {}
        self._uses = 0

    def observed(self, table: UsageTable, row: int) -> None:
        memory_id = table.ids[row]
        self._counts[memory_id] = self._counts.get(memory_id, 0.0) + 1
        self._uses += 1
        if self._uses % self.sample == 0:
            self._counts = {memory_id: count / 2 for memory_id, count in self._counts.items()}

    def forgotten(self, table: UsageTable, row: int) -> None:
        self._counts.pop(table.ids[row], None)

    def scores(self, table: UsageTable, held: np.ndarray) -> np.ndarray:
        counts = np.array([self._counts.get(memory_id, 0.0) for memory_id in table.ids])
        return np.where(table.nbytes[: len(table)] > 0, counts, 0.0)

    def rank(self, table: UsageTable, held: np.ndarray, budget_bytes: float) -> np.ndarray:
        counts = self.scores(table, held)
        by_recency = np.argsort(-table.last_use[: len(table)], kind="stable")
        kept = [row for row in by_recency if held[row] and table.nbytes[row] > 0]
        free = budget_bytes - sum(table.nbytes[row] for row in kept)
        for candidate in (row for row in by_recency if not held[row] and counts[row] > 0):
            victims: list[int] = []
            freed = free
            while freed < table.nbytes[candidate] and len(victims) < len(kept):
                victims.append(kept[-1 - len(victims)])
                freed += table.nbytes[victims[-1]]
            if freed < table.nbytes[candidate] or any(counts[victim] >= counts[candidate] for victim in victims):
                continue
            kept = [candidate, *kept[: len(kept) - len(victims)]]
            free = freed - table.nbytes[candidate]
        return np.array(kept, dtype=int)

    def state(self) -> dict[str, Any]:
        return {"counts": self._counts, "seen": self._uses}

    def restore(self, state: dict[str, Any]) -> None:
        counts, seen = state["counts"], state["seen"]
        if not isinstance(counts, dict) or type(seen) is not int:
            raise TypeError("counts have to be numbers by id, and seen a number of uses")
        self._counts, self._uses = {memory_id: float(count) for memory_id, count in counts.items()}, seen
