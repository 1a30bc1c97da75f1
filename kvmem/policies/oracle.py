"""Knows the trace: how well any policy of its kind could do."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from kvmem.policies import Policy
from kvmem.usage import UsageTable


@dataclass(config=ConfigDict(extra="forbid"))
class Oracle(Policy):
    """Greedy by the seconds that the next `horizon` uses will save, less the build, per byte. For simulations only.

    uses and edits: for each memory the times of its events, in observed uses, ascending. An edit ends the count, for
    what is built before it is worth nothing after. Greedy is not optimal: a trace's bound is quoted beside it.
    """

    uses: Mapping[str, Sequence[int]] = Field(default_factory=dict)
    edits: Mapping[str, Sequence[int]] = Field(default_factory=dict)
    horizon: int = Field(512, ge=1)

    name: ClassVar[str] = "oracle"

    def scores(self, table: UsageTable, held: np.ndarray) -> np.ndarray:
        n = len(table)
        coming = np.array([self._coming(memory_id, table.now) for memory_id in table.ids], dtype=float)
        net_s = coming * table.saved_s[:n] - np.where(held, 0.0, table.build_s[:n])
        return np.divide(net_s, table.nbytes[:n], out=np.zeros(n), where=table.nbytes[:n] > 0)

    def _coming(self, memory_id: str, now: int) -> int:
        uses, edits = self.uses.get(memory_id, ()), self.edits.get(memory_id, ())
        first = bisect_left(uses, now)
        edit = bisect_left(edits, now)
        end = min(now + self.horizon, edits[edit] if edit < len(edits) else now + self.horizon)
        return bisect_left(uses, end) - first
