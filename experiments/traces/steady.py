"""Steady: popularity that stays as it is."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from experiments.traces.base import Event, TraceFamily, zipf_shares


@dataclass(config=ConfigDict(extra="forbid"))
class Steady(TraceFamily):
    """Zipf popularity, in sessions: a user stays with a memory for a few queries (geometric, `session` on average)."""

    exponent: float = Field(1.0, ge=0)
    session: float = Field(2.0, ge=1)

    name: ClassVar[str] = "steady"

    def events(self, memories: int, uses: int, rng: np.random.Generator) -> list[Event]:
        shares = zipf_shares(memories, self.exponent, rng)
        events: list[Event] = []
        while len(events) < uses:
            memory = int(rng.choice(memories, p=shares))
            events += [Event("use", memory)] * int(rng.geometric(1 / self.session))
        return events[:uses]
