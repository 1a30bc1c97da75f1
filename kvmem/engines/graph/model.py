"""The forward pass: from token ids behind the first rows of a buffer to the next token and its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from kvmem.engines.base import BetweenLayers
from kvmem.engines.graph import attention
from kvmem.engines.graph.families import Family
from kvmem.engines.graph.fused_decode import layer_of_one_token, next_logits
from kvmem.engines.graph.kv_buffers import Buffer
from kvmem.engines.graph.layer_types import LayerShape, Where
from kvmem.engines.graph.layers import layer, layer_of_batch, rms_norm
from kvmem.engines.graph.weights import stack

Compile = Literal["auto", "none", "all_lengths", "each_length"]
LENGTHS_COMPILED = 64
"""`each_length` compiles this many lengths separately. Later lengths share one compilation for all lengths."""
RECOMPILE_LIMIT = 2 * LENGTHS_COMPILED + 4
"""Each length is compiled as an inner and as the last layer. Beyond this limit torch would run uncompiled code."""


class ModelRunner:
    """Runs one model. Its `inputs`, (2 + new,) int64 on the device, are the number of held rows, the number of real new
    ids, and the new ids, padded at the end with any ids.

    Padding is written behind the real tokens. They never attend to it because the mask is causal, and the next tokens
    overwrite it.
    """

    def __init__(
        self, model: PreTrainedModel, family: Family, kernel: str, rows: int, compile: Compile, fused: bool
    ) -> None:
        """rows: length of the rotary table, in positions. fused: uses the Triton kernels of `fused_decode`."""
        config = model.config
        self.shape = LayerShape.of(config, family, kernel, fused)
        self.layers = stack(model, family)
        decoder = model.get_decoder()
        self.embed, self.head = decoder.embed_tokens.weight.detach(), model.lm_head.weight.detach()
        self.last_norm = decoder.norm.weight.detach()
        with torch.no_grad():  # the model's own table, however its frequencies are scaled
            cos_1TD, sin_1TD = decoder.rotary_emb(self.embed[:1], torch.arange(rows, device=self.embed.device)[None])
        self.cos_TD, self.sin_TD = cos_1TD[0], sin_1TD[0]
        self.rotates = tuple(map(bool, config.no_rope_layers)) if family.skips_rope else None
        """Which layers have rotary embedding; None: all."""
        self.embedding_factor = config.embedding_multiplier if family.multipliers else 1.0
        self.logits_divisor = config.logits_scaling if family.multipliers else 1.0
        self.compile = compile
        self.lengths: set[int] = set()
        """The lengths that were compiled separately."""
        compiled = compile != "none"
        self.layer = torch.compile(layer, dynamic=False) if compiled else layer
        self.layer_of_batch = torch.compile(layer_of_batch) if compiled else layer_of_batch

    @torch.inference_mode()
    def __call__(
        self, inputs: torch.Tensor, buffer: Buffer, between_layers: BetweenLayers | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The greedy token (1,) and the logits (vocab,) after the last real id. Writes the new rows.

        between_layers: called before each layer.
        """
        held_1, real_1, ids_S = inputs[:1], inputs[1:2], inputs[2:]
        new = ids_S.shape[0]
        at_S = held_1 + torch.arange(new, device=inputs.device)
        length_1, last_1 = (held_1 + new).int(), real_1 - 1
        cos, sin = (table.index_select(0, at_S)[None, :, None] for table in (self.cos_TD, self.sin_TD))
        x_SC = self.embedded(ids_S)
        where = Where(cos, sin, at_S, length_1, self._plan(new, buffer, length_1))
        if new == 1 and self.shape.fused:
            logits_V = self._one_token(x_SC[0], buffer, where, between_layers)
        else:
            logits_V = self._several(x_SC[None], buffer, where, last_1, between_layers)
        return logits_V.argmax(keepdim=True), logits_V

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """The residual stream before the first layer, (…, hidden), of ids, (…)."""
        x_C = F.embedding(ids, self.embed)
        return x_C if self.embedding_factor == 1.0 else x_C * self.embedding_factor

    def logits(self, x_BSC: torch.Tensor) -> torch.Tensor:
        """The logits, (…, vocab), of the last layer's residual stream, (…, hidden)."""
        return self._divided(F.linear(rms_norm(x_BSC, self.last_norm, self.shape.eps), self.head))

    def _divided(self, logits_V: torch.Tensor) -> torch.Tensor:
        return logits_V if self.logits_divisor == 1.0 else logits_V / self.logits_divisor

    def turns(self, cos: torch.Tensor, sin: torch.Tensor) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
        """`cos` and `sin` for each layer. Rotating by those of a layer without rotary embedding changes no bit."""
        if self.rotates is None:
            return ((cos, sin),) * len(self.layers)
        still = torch.ones_like(cos), torch.zeros_like(sin)
        return [(cos, sin) if rotates else still for rotates in self.rotates]

    def _of_layers(self, where: Where) -> Sequence[Where]:
        if self.rotates is None:
            return (where,) * len(self.layers)
        return [Where(cos, sin, *where[2:]) for cos, sin in self.turns(where.cos_1S1D, where.sin_1S1D)]

    def _plan(self, new: int, buffer: Buffer, length_1: torch.Tensor) -> torch.Tensor | None:
        shape = self.shape
        q_like_BSHD = torch.empty((1, new, shape.heads, shape.head_dim), dtype=self.embed.dtype, device="meta")
        return attention.kernels()[shape.kernel].plan(q_like_BSHD, buffer.layers[0][0], length_1)

    def _one_token(
        self, x_C: torch.Tensor, buffer: Buffer, where: Where, between_layers: BetweenLayers | None
    ) -> torch.Tensor:
        for w, (k, v), at in zip(self.layers, buffer.layers, self._of_layers(where), strict=True):
            if between_layers is not None:
                between_layers()
            x_C = layer_of_one_token(x_C, k, v, at, w, self.shape)
        return self._divided(next_logits(x_C, self.last_norm, self.shape.eps, self.head))

    def _several(
        self,
        x_1SC: torch.Tensor,
        buffer: Buffer,
        where: Where,
        last_1: torch.Tensor,
        between_layers: BetweenLayers | None,
    ) -> torch.Tensor:
        added_1SC = torch.zeros_like(x_1SC)
        any_length = self._is_for_any_length(x_1SC.shape[1])
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            for i, (w, (k, v), at) in enumerate(zip(self.layers, buffer.layers, self._of_layers(where), strict=True)):
                if between_layers is not None:
                    between_layers()
                if any_length:
                    for tensor, dim in ((x_1SC, 1), (added_1SC, 1), *zip(at[:3], (1, 1, 0), strict=True)):
                        torch._dynamo.maybe_mark_dynamic(tensor, dim)
                last = last_1 if i == len(self.layers) - 1 else None
                x_1SC, added_1SC = self.layer(x_1SC, added_1SC, k, v, at, last, w, self.shape)
        return self.logits(x_1SC + added_1SC)[0, 0]

    def _is_for_any_length(self, new: int) -> bool:
        """Whether the code for `new` tokens is shared with other lengths."""
        if self.compile == "each_length" and len(self.lengths) < LENGTHS_COMPILED:
            self.lengths.add(new)
        return self.compile != "none" and new > 1 and new not in self.lengths

    @torch.inference_mode()
    def advance(self, inputs: torch.Tensor, buffer: Buffer) -> tuple[torch.Tensor, torch.Tensor]:
        """One decoding step. Updates `inputs`, (3,), on the device to those of the next step, without the host."""
        token, logits_V = self(inputs, buffer)
        inputs[:1] += 1
        inputs[2:] = token
        return token, logits_V
