"""Evicts the least frequently used memory first."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from kvmem.scheduler.policies.base import Policy
from kvmem.scheduler.usage import UsageTable


@dataclass(config=ConfigDict(extra="forbid"))
class LFU(Policy):
    """Keeps the memories used most often since the start; among equals, the most recently used."""

    name: ClassVar[str] = "lfu"

    def scores(self, table: UsageTable, held: np.ndarray) -> np.ndarray:
        n = len(table)
        recency = np.maximum(table.last_use[:n], 0.0) / (table.now + 1)  # below 1, so it only breaks ties
        return np.where((table.uses[:n] > 0) & (table.nbytes[:n] > 0), table.uses[:n] + recency, 0.0)
