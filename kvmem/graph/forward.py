"""The straight pass: token ids behind the first rows of a buffer -> the next token and its logits."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from kvmem.graph.buffers import Buffer
from kvmem.graph.layer import LayerShape, layer, layer_of_branches, rms_norm
from kvmem.graph.weights import check_covered, stack

Compile = Literal["auto", "none", "all_lengths", "each_length"]
LENGTHS_COMPILED = 64
"""As many lengths as each_length compiles before torch would give up and run as written."""


class Pass:
    """One model. Called with `inputs` on the device, (2 + new,) int64: how many rows are held, how many of the new ids
    are real, and the new ids, padded at the end with any.

    A pad is written behind the real tokens and is never attended to by one of them: the mask is causal, and the next
    tokens overwrite it.
    """

    def __init__(self, model: PreTrainedModel, kernel: str, rows: int, compile: Compile) -> None:
        """rows: positions up to which the rotary table goes. Raises ModelError for a model that is not covered."""
        check_covered(model)
        self.shape = LayerShape.of(model.config, kernel)
        self.layers = stack(model)
        decoder = model.get_decoder()
        self.embed, self.head = decoder.embed_tokens.weight.detach(), model.lm_head.weight.detach()
        self.last_norm = decoder.norm.weight.detach()
        with torch.no_grad():  # the model's own table, whatever scales its frequencies
            cos_1TD, sin_1TD = decoder.rotary_emb(self.embed[:1], torch.arange(rows, device=self.embed.device)[None])
        self.cos_TD, self.sin_TD = cos_1TD[0], sin_1TD[0]
        self.compile = compile
        compiled = compile != "none"
        self.layer = torch.compile(layer, dynamic=False) if compiled else layer
        self.layer_of_branches = torch.compile(layer_of_branches) if compiled else layer_of_branches

    @torch.inference_mode()
    def __call__(self, inputs: torch.Tensor, buffer: Buffer) -> tuple[torch.Tensor, torch.Tensor]:
        """The greedy token (1,) and the logits (vocab,) behind the last real id. Writes the new rows."""
        held_1, real_1, ids_S = inputs[:1], inputs[1:2], inputs[2:]
        new = ids_S.shape[0]
        at_S = held_1 + torch.arange(new, device=inputs.device)
        length_1, last_1 = (held_1 + new).int(), real_1 - 1
        cos, sin = (table.index_select(0, at_S)[None, :, None] for table in (self.cos_TD, self.sin_TD))
        x_BSC = F.embedding(ids_S, self.embed)[None]
        added_BSC = torch.zeros_like(x_BSC)
        with torch._dynamo.config.patch(recompile_limit=LENGTHS_COMPILED):
            for i, (w, (k, v)) in enumerate(zip(self.layers, buffer.layers, strict=True)):
                if self.compile == "all_lengths" and new > 1:
                    for tensor, dim in ((x_BSC, 1), (added_BSC, 1), (cos, 1), (sin, 1), (at_S, 0)):
                        torch._dynamo.maybe_mark_dynamic(tensor, dim)
                last = last_1 if i == len(self.layers) - 1 else None
                x_BSC, added_BSC = self.layer(x_BSC, added_BSC, cos, sin, k, v, at_S, length_1, last, w, self.shape)
        hidden_BSC = rms_norm(x_BSC + added_BSC, self.last_norm, self.shape.eps)
        logits_V = F.linear(hidden_BSC, self.head)[0, 0]
        return logits_V.argmax(keepdim=True), logits_V

    @torch.inference_mode()
    def advance(self, inputs: torch.Tensor, buffer: Buffer) -> tuple[torch.Tensor, torch.Tensor]:
        """One token of decoding, after which `inputs` (3,) are those of the next: the host has no part in it."""
        token, logits_V = self(inputs, buffer)
        inputs[:1] += 1
        inputs[2:] = token
        return token, logits_V
