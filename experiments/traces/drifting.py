"""Drifting: what is popular changes, little by little."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from experiments.traces.base import Event, TraceFamily, zipf_shares


@dataclass(config=ConfigDict(extra="forbid"))
class Drifting(TraceFamily):
    """Zipf popularity and sessions as in `steady`; every `every` uses, two random memories trade their popularity."""

    exponent: float = Field(1.0, ge=0)
    session: float = Field(2.0, ge=1)
    every: int = Field(10, ge=1)

    name: ClassVar[str] = "drifting"

    def events(self, memories: int, uses: int, rng: np.random.Generator) -> list[Event]:
        shares = zipf_shares(memories, self.exponent, rng)
        events: list[Event] = []
        trades = 0
        while len(events) < uses:
            while trades < len(events) // self.every:
                one, other = rng.choice(memories, 2, replace=False)
                shares[[one, other]] = shares[[other, one]]
                trades += 1
            memory = int(rng.choice(memories, p=shares))
            events += [Event("use", memory)] * int(rng.geometric(1 / self.session))
        return events[:uses]
