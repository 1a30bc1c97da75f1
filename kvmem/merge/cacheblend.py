"""RopeShift, and the tokens whose keys and values are furthest from a joint prefill's computed anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from transformers import PreTrainedModel

from kvmem.merge.concat import Concatenated
from kvmem.merge.recompute import recompute
from kvmem.merge.ropeshift import RopeShift

LAYERS = 2
"""Layer 0 deviates nowhere; the next is the first that tells, and tokens that deviate there do so in later ones too."""


@dataclass(config=ConfigDict(extra="forbid"))
class CacheBlend(RopeShift):
    """Yao et al., "CacheBlend: fast large language model serving for RAG with cached knowledge fusion", 2024. The
    tokens are chosen once, by their deviation in layer 1; the paper chooses anew from layer to layer. Not exact."""

    ratio: float = Field(default=0.15, gt=0, le=1)
    """Which share of the tokens behind the first block."""

    name: ClassVar[str] = "CacheBlend"

    @torch.inference_mode()
    def chosen(self, blocks: Concatenated, model: PreTrainedModel) -> Sequence[int]:
        bodies = [at for start, end in blocks.bodies for at in range(start, end)]
        if not bodies:
            return ()
        joint = [(keys.clone(), values.clone()) for keys, values in blocks.layers[:LAYERS]]
        recompute(model, blocks.token_ids, joint, sorted({*blocks.glue, *bodies}))
        deviation_T = sum(
            (anew.float() - stored.float())[0].pow(2).sum(dim=(0, 2))
            for anew, stored in zip(joint[-1], blocks.layers[len(joint) - 1], strict=True)
        )
        assert isinstance(deviation_T, torch.Tensor)
        at = torch.tensor(bodies, device=deviation_T.device)
        count = max(1, round(self.ratio * len(bodies)))
        return at[deviation_T[at].topk(count).indices].tolist()
