"""Knows the trace: how well a policy of its kind could do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from kvmem.scheduler.policies.base import Policy
from kvmem.scheduler.usage import UsageTable

_FAR = 1 << 40
"""Longer than any trace: memory × _FAR + time sorts by memory, then by time."""


@dataclass(config=ConfigDict(extra="forbid"))
class Oracle(Policy):
    """Greedy by the seconds that the next `horizon` uses will save, less the build, per byte. For simulations only.

    uses and edits: for each row of the table the times of its events, in observed uses, ascending. An edit ends the
    count, for what is built before it is worth nothing after. Greedy is not optimal: a trace's bound stands beside it.
    """

    horizon: int = Field(512, ge=1)
    uses: Sequence[Sequence[int]] = ()
    edits: Sequence[Sequence[int]] = ()

    name: ClassVar[str] = "oracle"

    def __post_init__(self) -> None:
        self._uses, self._edits = _flat(self.uses), _flat(self.edits)

    def scores(self, table: UsageTable, held: np.ndarray) -> np.ndarray:
        n = len(table)
        start = np.arange(n) * _FAR
        edit_at = np.searchsorted(self._edits, start + table.now)
        next_edit = np.append(self._edits, n * _FAR)[edit_at] - start  # another memory's edit is far beyond the horizon
        end = np.minimum(table.now + self.horizon, next_edit)
        coming = np.searchsorted(self._uses, start + end) - np.searchsorted(self._uses, start + table.now)
        net_s = coming * table.saved_s[:n] - np.where(held, 0.0, table.build_s[:n])
        return np.divide(net_s, table.nbytes[:n], out=np.zeros(n), where=table.nbytes[:n] > 0)


def _flat(times: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array([row * _FAR + time for row, of_row in enumerate(times) for time in of_row], dtype=np.int64)
