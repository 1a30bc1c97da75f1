"""Knows the future of a trace: how well a greedy policy could do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from kvmem.scheduler.policies.base import Policy
from kvmem.scheduler.usage import UsageTable

_FAR = 1 << 40
"""Longer than any trace, so that row × _FAR + time sorts by row, then by time."""


@dataclass(config=ConfigDict(extra="forbid"))
class Oracle(Policy):
    """Greedy by the seconds that the next `horizon` uses save, minus the build, per byte. For simulations only.

    uses and edits: for each row of the table, the times of its events in observed uses, ascending. Uses are counted up
    to the next edit, because KV built before an edit is worthless after it. Greedy is not optimal; a trace's upper
    bound is reported separately.
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
        next_edit = np.append(self._edits, n * _FAR)[edit_at] - start  # another row's edit is far beyond the horizon
        end = np.minimum(table.now + self.horizon, next_edit)
        coming = np.searchsorted(self._uses, start + end) - np.searchsorted(self._uses, start + table.now)
        net_s = coming * table.saved_s[:n] - np.where(held, 0.0, table.build_s[:n])
        out = np.zeros(n)
        np.divide(net_s, table.nbytes[:n], out=out, where=table.nbytes[:n] > 0)
        return out


def _flat(times: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array([row * _FAR + time for row, row_times in enumerate(times) for time in row_times], dtype=np.int64)
