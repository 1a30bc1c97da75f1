"""Expected seconds saved, minus the build, per byte. The default policy."""

from __future__ import annotations

from collections import deque
from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from kvmem.scheduler.policies.base import Policy
from kvmem.scheduler.usage import HALF_LIVES, UsageTable


@dataclass(config=ConfigDict(extra="forbid"))
class BenefitPerByte(Policy):
    """(expected uses × seconds saved per use − build seconds if it is not built) ÷ bytes.

    Expected uses are those among the next `horizon` uses of all memories, at the rate of the decayed past. How fast the
    past should decay depends on the traffic. So several half-lives are kept, and each is weighted by how well it has
    recently predicted, `lag` uses ahead, which memory is used (weighted forecasters: Vovk 1990; Littlestone & Warmuth
    1994). The prediction is for `lag` uses ahead because the next use mostly belongs to the same session, while a build
    pays off over the uses after it. `discount` is subtracted from each memory's count, because a small count is mostly
    luck (absolute discounting: Ney et al. 1994). An edit makes stored KV worthless, so the expected uses are divided by
    the expected number of texts: a memory that is edited within its reuse time never earns its build.
    """

    horizon: float = Field(256, gt=0)
    lag: int = Field(32, ge=0)
    discount: float = Field(0.5, ge=0)
    memory: float = Field(0.998, gt=0, lt=1)
    """Decay per use of a half-life's past success: 0.998 looks back about 500 uses."""
    prior: float = Field(1.0, gt=0)
    """Uses added to every memory when half-lives are compared, so that a new memory rules out none of them."""

    name: ClassVar[str] = "benefit_per_byte"

    def __post_init__(self) -> None:
        self._success = np.zeros(len(HALF_LIVES))
        self._recent: deque[str] = deque(maxlen=self.lag)
        ages = np.arange(self.lag, 0, -1)[:, None] - 1.0
        self._fading = np.exp2(-ages / HALF_LIVES)  # (lag, half-lives): the current weight of each recent use

    def observed(self, table: UsageTable, row: int) -> None:
        if len(self._recent) == self.lag:
            decay = np.exp2(-(table.now - table.weighed_at[row]) / HALF_LIVES)
            own = [memory_id == table.ids[row] for memory_id in self._recent]
            undecayed = np.exp2(self.lag / HALF_LIVES)  # back to the weights of `lag` uses ago
            weight = (table.use_weights[row] * decay - self._fading[own].sum(axis=0)) * undecayed
            total = (table.totals - self._fading.sum(axis=0)) * undecayed
            predicted = (np.maximum(weight, 0) + self.prior) / (np.maximum(total, 0) + self.prior * len(table))
            self._success = self.memory * self._success + np.log(predicted)
        self._recent.append(table.ids[row])

    def forgotten(self, table: UsageTable, row: int) -> None:
        kept = [memory_id for memory_id in self._recent if memory_id != table.ids[row]]
        self._recent = deque(kept, maxlen=self.lag)

    def scores(self, table: UsageTable, held: np.ndarray) -> np.ndarray:
        n = len(table)
        net_s = self._expected_uses(table) * table.saved_s[:n] - np.where(held, 0.0, table.build_s[:n])
        out = np.zeros(n)
        np.divide(net_s, table.nbytes[:n], out=out, where=table.nbytes[:n] > 0)
        return out

    def _shares(self) -> np.ndarray:
        """The weight of each half-life's forecast, (half-lives,); they sum to 1."""
        odds: np.ndarray = np.exp(self._success - self._success.max())
        shares: np.ndarray = odds / odds.sum()
        return shares

    def _expected_uses(self, table: UsageTable) -> np.ndarray:
        uses, edits = table.weights()
        spanned = HALF_LIVES / np.log(2) * (1 - np.exp2(-(table.now + 1) / HALF_LIVES))  # uses that the weights cover
        ahead = np.minimum(1.0, self.horizon / spanned)
        expected: np.ndarray = (np.maximum(uses - self.discount, 0) * ahead / (1 + edits * ahead)) @ self._shares()
        return expected

    def state(self) -> dict[str, Any]:
        return {"success": self._success.tolist(), "recent": list(self._recent)}

    def restore(self, state: dict[str, Any]) -> None:
        success, recent = np.array(state["success"], dtype=float), state["recent"]
        if success.shape != HALF_LIVES.shape or not np.isfinite(success).all():
            raise ValueError(f"success has to be {len(HALF_LIVES)} finite numbers")
        if not isinstance(recent, list) or not all(isinstance(memory_id, str) for memory_id in recent):
            raise TypeError("recent has to be a list of ids")
        self._success, self._recent = success, deque(recent, maxlen=self.lag)

    def explain(self, table: UsageTable, row: int, held: bool) -> str:
        uses = self._expected_uses(table)[row]
        half_life = float(HALF_LIVES @ self._shares())
        build = "built" if held else f"to build in {table.build_s[row]:.3f} s"
        return (
            f"{uses:.2f} uses expected (half-life about {half_life:.0f} uses, {int(table.edits[row])} edits) x "
            f"{table.saved_s[row]:.3f} s saved each, {build}, {table.nbytes[row] / 1e6:.1f} MB"
        )
