"""What was observed of each text memory: uses and edits, decayed at several half-lives, and its costs.

Time is counted in observed uses, not in seconds. A decision then does not depend on how busy the service is, is the
same after a restart, and can be replayed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

HALF_LIVES = np.array([32.0, 128.0, 512.0, 2048.0])
"""In observed uses of all memories together."""

_MIN_ROWS = 16
_GROWTH = 2


@dataclass
class UsageTable:
    """One row for each text memory. A column is a numpy array whose first `len(table)` entries are valid.

    `use_weights` and `edit_weights` have the shape (rows, half-lives): each event counts 1 and halves every half-life.
    A row's weights are as of its `weighed_at`; `weights()` brings all of them to now.
    """

    ids: list[str] = field(default_factory=list)
    now: int = 0
    totals: np.ndarray = field(default_factory=lambda: np.zeros(len(HALF_LIVES)))
    """Sum of all rows' use weights as of now, (half-lives,)."""

    def __post_init__(self) -> None:
        self.row_of = {memory_id: row for row, memory_id in enumerate(self.ids)}
        self._allocate(max(_MIN_ROWS, len(self.ids)))

    def _allocate(self, rows: int) -> None:
        def zeros(*more: int) -> np.ndarray:
            return np.zeros((rows, *more))

        self.uses, self.edits, self.first_use, self.last_use, self.weighed_at = (zeros() for _ in range(5))
        self.tokens, self.nbytes, self.build_s, self.saved_s = (zeros() for _ in range(4))
        self.use_weights, self.edit_weights = zeros(len(HALF_LIVES)), zeros(len(HALF_LIVES))

    _COLUMNS = (
        "uses",
        "edits",
        "first_use",
        "last_use",
        "weighed_at",
        "tokens",
        "nbytes",
        "build_s",
        "saved_s",
        "use_weights",
        "edit_weights",
    )

    def __len__(self) -> int:
        return len(self.ids)

    def track(self, memory_id: str) -> int:
        """The row of `memory_id`, added if it is new."""
        if memory_id not in self.row_of:
            row = len(self.ids)
            if row == len(self.uses):
                old = {name: getattr(self, name) for name in self._COLUMNS}
                self._allocate(row * _GROWTH)
                for name, column in old.items():
                    getattr(self, name)[:row] = column
            self.ids.append(memory_id)
            self.row_of[memory_id] = row
            self.weighed_at[row] = self.first_use[row] = self.now
            self.last_use[row] = -np.inf
        return self.row_of[memory_id]

    def used(self, memory_id: str) -> int:
        """Counts one use and advances the time by one. Returns the row."""
        row = self.track(memory_id)
        self.now += 1
        self.totals = self.totals * np.exp2(-1 / HALF_LIVES) + 1
        self._decay(row)
        self.use_weights[row] += 1
        self.uses[row] += 1
        self.last_use[row] = self.now
        return row

    def edited(self, memory_id: str) -> int:
        """Counts one edit. Returns the row."""
        row = self.track(memory_id)
        self._decay(row)
        self.edit_weights[row] += 1
        self.edits[row] += 1
        return row

    def forget(self, memory_id: str) -> None:
        """Removes a row, as if the memory had never been used. Later rows move up by one."""
        row, n = self.row_of[memory_id], len(self)
        self._decay(row)
        self.totals = np.maximum(self.totals - self.use_weights[row], 0.0)
        for name in self._COLUMNS:
            column = getattr(self, name)
            column[row : n - 1] = column[row + 1 : n]
            column[n - 1] = 0
        del self.ids[row]
        self.row_of = {other: at for at, other in enumerate(self.ids)}

    def weights(self) -> tuple[np.ndarray, np.ndarray]:
        """Use and edit weights of every row as of now, each (rows, half-lives)."""
        n = len(self)
        decay = np.exp2(-(self.now - self.weighed_at[:n, None]) / HALF_LIVES)
        return self.use_weights[:n] * decay, self.edit_weights[:n] * decay

    def _decay(self, row: int) -> None:
        decay = np.exp2(-(self.now - self.weighed_at[row]) / HALF_LIVES)
        self.use_weights[row] *= decay
        self.edit_weights[row] *= decay
        self.weighed_at[row] = self.now

    def state(self) -> dict[str, Any]:
        """Plain values for a file."""
        n = len(self)
        columns = {name: getattr(self, name)[:n].tolist() for name in self._COLUMNS}
        columns["last_use"] = [None if np.isinf(last) else last for last in columns["last_use"]]  # JSON has no infinity
        return {"ids": self.ids, "now": self.now, "totals": self.totals.tolist(), "columns": columns}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> UsageTable:
        """The inverse of `state`. Raises KeyError, TypeError or ValueError for a state that is damaged."""
        ids, now, totals = state["ids"], state["now"], np.array(state["totals"], dtype=float)
        if not isinstance(ids, list) or not all(isinstance(memory_id, str) for memory_id in ids):
            raise TypeError("ids have to be a list of texts")
        if len(set(ids)) < len(ids) or type(now) is not int or now < 0:
            raise ValueError("ids have to differ, and now is a number of uses")
        if totals.shape != HALF_LIVES.shape or not np.isfinite(totals).all():
            raise ValueError(f"totals have to be {len(HALF_LIVES)} finite numbers")
        table = cls(list(ids), now, totals)
        n = len(table)
        for name in cls._COLUMNS:
            values = state["columns"][name]
            if name == "last_use":
                values = [-np.inf if last is None else last for last in values]
            column, rows = np.array(values, dtype=float), getattr(table, name)[:n]
            if n and (column.shape != rows.shape or not np.isfinite(column[column != -np.inf]).all()):
                raise ValueError(f"the column {name} has to be finite numbers of shape {rows.shape}")
            if n:
                rows[:] = column
        return table
