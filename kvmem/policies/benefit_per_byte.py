"""Expected seconds saved, less the build, per byte: the default."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from kvmem.policies import Policy
from kvmem.usage import HALF_LIVES, UsageTable


@dataclass(config=ConfigDict(extra="forbid"))
class BenefitPerByte(Policy):
    """(expected uses × seconds saved a use − build seconds where it is not built) ÷ bytes.

    Expected uses: as many as the decayed past held. How fast the past should fade depends on the traffic, so several
    half-lives are kept and mixed by how well each has lately predicted which memory is used next (weighted
    forecasters: Vovk 1990; Littlestone & Warmuth 1994). An edit ends the worth of what is built, so the uses are
    shared out over as many texts as are to be expected: a memory edited within its reuse time never earns its build.
    """

    memory: float = Field(0.98, gt=0, lt=1)
    """How much of a half-life's past success counts after one more use: 0.98 looks back some 50 uses."""
    prior: float = Field(0.1, gt=0)
    """Uses that every memory is credited with when half-lives are compared, so that a new one sinks none of them."""

    name: ClassVar[str] = "benefit_per_byte"

    def __post_init__(self) -> None:
        self._success = np.zeros(len(HALF_LIVES))

    def observed(self, table: UsageTable, row: int) -> None:
        decay = np.exp2(-(table.now - table.weighed_at[row]) / HALF_LIVES)
        chance = (table.use_weights[row] * decay + self.prior) / (table.totals + self.prior * len(table))
        self._success = self.memory * self._success + np.log(chance)

    def scores(self, table: UsageTable, held: np.ndarray) -> np.ndarray:
        n = len(table)
        net_s = self._expected_uses(table) * table.saved_s[:n] - np.where(held, 0.0, table.build_s[:n])
        return np.divide(net_s, table.nbytes[:n], out=np.zeros(n), where=table.nbytes[:n] > 0)

    def _shares(self) -> np.ndarray:
        """(half-lives,): how much each one's forecast counts; sums to 1."""
        odds = np.exp(self._success - self._success.max())
        return odds / odds.sum()

    def _expected_uses(self, table: UsageTable) -> np.ndarray:
        uses, edits = table.weights()
        return (uses / (1 + edits)) @ self._shares()

    def state(self) -> dict[str, Any]:
        return {"success": self._success.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        self._success = np.array(state["success"])

    def explain(self, table: UsageTable, row: int, held: bool) -> str:
        uses = self._expected_uses(table)[row]
        half_life = float(HALF_LIVES @ self._shares())
        build = "built" if held else f"to build in {table.build_s[row]:.3f} s"
        return (
            f"{uses:.2f} uses expected (half-life about {half_life:.0f} uses, {int(table.edits[row])} edits) x "
            f"{table.saved_s[row]:.3f} s saved each, {build}, {table.nbytes[row] / 1e6:.1f} MB"
        )
