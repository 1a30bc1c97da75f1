"""CacheBlend: RopeShift, with the tokens recomputed that deviate most from a joint prefill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from transformers import PreTrainedModel

from kvmem.merge.concat import ConcatenatedBlocks
from kvmem.merge.recompute import recompute
from kvmem.merge.ropeshift import RopeShift

SELECTION_LAYERS = 2
"""Layer 0 never deviates. Layer 1 is the first that can, and tokens that deviate there also do in later layers."""


@dataclass(config=ConfigDict(extra="forbid"))
class CacheBlend(RopeShift):
    """Recomputes the tokens whose keys and values deviate most from a joint prefill in layer 1. Not exact.

    Yao et al., "CacheBlend: Fast Large Language Model Serving for RAG with Cached Knowledge Fusion", 2024. The paper
    selects the tokens again in every layer; here they are selected once.
    """

    ratio: float = Field(default=0.15, gt=0, le=1)
    """The fraction of the tokens after the first block that is recomputed."""

    name: ClassVar[str] = "CacheBlend"

    @torch.inference_mode()
    def positions_to_recompute(self, blocks: ConcatenatedBlocks, model: PreTrainedModel) -> Sequence[int]:
        positions = [position for start, end in blocks.body_spans for position in range(start, end)]
        if not positions:
            return ()
        joint = [(keys.clone(), values.clone()) for keys, values in blocks.layers[:SELECTION_LAYERS]]
        recompute(model, blocks.token_ids, joint, sorted({*blocks.gap_positions, *positions}))
        deviation_T = torch.stack(
            [
                (recomputed.float() - stored.float())[0].pow(2).sum(dim=(0, 2))
                for recomputed, stored in zip(joint[-1], blocks.layers[len(joint) - 1], strict=True)
            ]
        ).sum(dim=0)
        positions_N = torch.tensor(positions, device=deviation_T.device)
        count = max(1, round(self.ratio * len(positions)))
        selected: list[int] = positions_N[deviation_T[positions_N].topk(count).indices].tolist()
        return selected
