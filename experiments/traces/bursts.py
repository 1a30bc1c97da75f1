"""Bursts: memories flare up and go quiet, and some texts change while they are hot."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from experiments.traces.base import Event, TraceFamily, zipf_shares


@dataclass(config=ConfigDict(extra="forbid"))
class Bursts(TraceFamily):
    """`burst_share` of the uses go to the few memories that are in a burst, the rest by Zipf. A quarter of the memories
    is unstable: before each use of one, its text changes with the chance `edit_chance`; the others change rarely."""

    exponent: float = Field(0.9, ge=0)
    burst_share: float = Field(0.6, ge=0, le=1)
    burst_uses: int = Field(120, ge=1)
    """How many uses, of all memories, a burst lasts on average."""
    at_once: int = Field(4, ge=1)
    unstable_share: float = Field(0.25, ge=0, le=1)
    edit_chance: float = Field(0.5, ge=0, le=1)
    rare_edit_chance: float = Field(0.005, ge=0, le=1)

    name: ClassVar[str] = "bursts"

    def events(self, memories: int, uses: int, rng: np.random.Generator) -> list[Event]:
        shares = zipf_shares(memories, self.exponent, rng)
        unstable = rng.random(memories) < self.unstable_share
        hot = [int(memory) for memory in rng.choice(memories, self.at_once)]
        events: list[Event] = []
        for _ in range(uses):
            for slot in range(self.at_once):
                if rng.random() < 1 / self.burst_uses:
                    hot[slot] = int(rng.integers(memories))
            in_burst = rng.random() < self.burst_share
            memory = hot[int(rng.integers(self.at_once))] if in_burst else int(rng.choice(memories, p=shares))
            if rng.random() < (self.edit_chance if unstable[memory] else self.rare_edit_chance):
                events.append(Event("edit", memory))
            events.append(Event("use", memory))
        return events
