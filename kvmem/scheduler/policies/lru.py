"""Evicts the least recently used memory first."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from kvmem.scheduler.policies.base import Policy
from kvmem.scheduler.usage import UsageTable


@dataclass(config=ConfigDict(extra="forbid"))
class LRU(Policy):
    """Keeps the most recently used memories, regardless of size, cost and edits. Every use leads to a build."""

    name: ClassVar[str] = "lru"

    def scores(self, table: UsageTable, held: np.ndarray) -> np.ndarray:
        n = len(table)
        return np.where((table.uses[:n] > 0) & (table.nbytes[:n] > 0), table.last_use[:n], 0.0)
