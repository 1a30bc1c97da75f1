"""RopeShift, and the first tokens of each further block computed anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from transformers import PreTrainedModel

from kvmem.merge.concat import Concatenated
from kvmem.merge.ropeshift import RopeShift


@dataclass(config=ConfigDict(extra="forbid"))
class LegoLink(RopeShift):
    """Built alone, a block's first tokens draw the attention that a text's first tokens draw; behind other blocks they
    should not. LegoLink of Hu et al., "EPIC: efficient position-independent caching", 2024. Not exact."""

    tokens: int = Field(default=16, ge=1)
    """So many of each block behind the first, fewer where it is shorter."""

    name: ClassVar[str] = "LegoLink"

    def chosen(self, blocks: Concatenated, model: PreTrainedModel) -> Sequence[int]:
        return [at for start, end in blocks.bodies for at in range(start, min(start + self.tokens, end))]
