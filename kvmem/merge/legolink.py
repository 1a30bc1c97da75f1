"""LegoLink: RopeShift, with the first tokens of every block after the first recomputed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from transformers import PreTrainedModel

from kvmem.merge.concat import ConcatenatedBlocks
from kvmem.merge.ropeshift import RopeShift


@dataclass(config=ConfigDict(extra="forbid"))
class LegoLink(RopeShift):
    """Recomputes the first tokens of every block after the first. Not exact.

    The first tokens of a block that was built alone are attention sinks, which they should not be after other blocks.
    LegoLink of Hu et al., "EPIC: Efficient Position-Independent Caching for Serving Large Language Models", 2024.
    """

    tokens: int = Field(default=16, ge=1)
    """How many tokens of each block are recomputed; all of a shorter block."""

    name: ClassVar[str] = "LegoLink"

    def positions_to_recompute(self, blocks: ConcatenatedBlocks, model: PreTrainedModel) -> Sequence[int]:
        return [at for start, end in blocks.body_spans for at in range(start, min(start + self.tokens, end))]
