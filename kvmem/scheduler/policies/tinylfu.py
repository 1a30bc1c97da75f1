"""Recency decides who leaves, frequency who may come in."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from kvmem.scheduler.policies.base import Policy
from kvmem.scheduler.usage import UsageTable


@dataclass(config=ConfigDict(extra="forbid"))
class TinyLFU(Policy):
    """A newcomer takes the place of the least recently used only if it was used more often (Einziger et al. 2017).

    Frequencies are halved every `sample` uses, so old fame fades. The paper counts in a sketch; here counts are exact,
    because a text memory is large enough to carry a number.
    """

    sample: int = Field(1000, ge=1)

    name: ClassVar[str] = "tinylfu"

    def __post_init__(self) -> None:
        self._counts: dict[str, float] = {}
        self._seen = 0

    def observed(self, table: UsageTable, row: int) -> None:
        memory_id = table.ids[row]
        self._counts[memory_id] = self._counts.get(memory_id, 0.0) + 1
        self._seen += 1
        if self._seen % self.sample == 0:
            self._counts = {memory_id: count / 2 for memory_id, count in self._counts.items()}

    def scores(self, table: UsageTable, held: np.ndarray) -> np.ndarray:
        counts = np.array([self._counts.get(memory_id, 0.0) for memory_id in table.ids])
        return np.where(table.nbytes[: len(table)] > 0, counts, 0.0)

    def rank(self, table: UsageTable, held: np.ndarray, budget_bytes: float) -> np.ndarray:
        counts = self.scores(table, held)
        by_recency = np.argsort(-table.last_use[: len(table)], kind="stable")
        kept = [row for row in by_recency if held[row] and table.nbytes[row] > 0]
        room = budget_bytes - sum(table.nbytes[row] for row in kept)
        for newcomer in (row for row in by_recency if not held[row] and counts[row] > 0):
            victims: list[int] = []
            freed = room
            while freed < table.nbytes[newcomer] and len(victims) < len(kept):
                victims.append(kept[-1 - len(victims)])
                freed += table.nbytes[victims[-1]]
            if freed < table.nbytes[newcomer] or any(counts[victim] >= counts[newcomer] for victim in victims):
                continue
            kept = [newcomer, *kept[: len(kept) - len(victims)]]
            room = freed - table.nbytes[newcomer]
        return np.array(kept, dtype=int)

    def state(self) -> dict[str, Any]:
        return {"counts": self._counts, "seen": self._seen}

    def restore(self, state: dict[str, Any]) -> None:
        self._counts, self._seen = dict(state["counts"]), state["seen"]
