"""MemOS's score, in which retrieval order outranks usage."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from kvmem.scheduler.policies.base import Policy
from kvmem.scheduler.usage import UsageTable


@dataclass(config=ConfigDict(extra="forbid"))
class MemOSTopK(Policy):
    """Keeps the `top_k` memories with the highest 0.9 × retrieval rank + at most 0.35 for keywords and repetition.

    The published baseline, in two respects better than published. Retrieval is taken to find the memory that is used,
    so the rank is that of the last use. A memory that stays among the top is not built again, while MemOS rebuilds all
    of them as one prompt and keeps nothing if that fails.
    """

    top_k: int = Field(20, ge=1)
    refresh_uses: int = Field(60, ge=1)
    """Uses between two decisions: 300 s at one query every 5 s."""
    rank_step: float = 0.9
    repetition_step: float = 0.05
    repetition_at_most: float = 0.35

    name: ClassVar[str] = "memos_topk"

    def __post_init__(self) -> None:
        self._decided: np.ndarray = np.zeros(0)
        self._decided_at = -self.refresh_uses

    def forgotten(self, table: UsageTable, row: int) -> None:
        if row < len(self._decided):
            self._decided = np.delete(self._decided, row)

    def scores(self, table: UsageTable, held: np.ndarray) -> np.ndarray:
        n = len(table)
        if table.now - self._decided_at >= self.refresh_uses:
            rank = np.argsort(np.argsort(table.last_use[:n], kind="stable"), kind="stable")  # 0: least recently used
            repetition = np.minimum(self.repetition_at_most, self.repetition_step * table.uses[:n])
            score = self.rank_step * rank + repetition
            keep = (table.uses[:n] > 0) & (table.nbytes[:n] > 0)
            top = np.argsort(-np.where(keep, score, -1.0), kind="stable")[: self.top_k]
            self._decided = np.zeros(n)
            self._decided[top] = np.where(keep[top], score[top] + 1.0, 0.0)
            self._decided_at = table.now
        return np.concatenate([self._decided, np.zeros(n - len(self._decided))])
