"""Several queries with one memory, which is in a buffer once; each answer has rows of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache

from kvmem.engines.graph.engine import Engine, RunningSequence
from kvmem.engines.graph.model import RECOMPILE_LIMIT
from kvmem.errors import CapacityError


class SharedPrefixBatch:
    """Answers that share the first `held` tokens of a memory, each with at most `room` tokens of its own."""

    def __init__(self, engine: Engine, cache: DynamicCache, held: int, batch: int, room: int) -> None:
        self.engine, self.held, self.room = engine, held, room
        self.memory = RunningSequence(cache, held, held)
        shape, layers = engine.run.shape, len(engine.run.layers)
        size = (layers, batch, shape.kv_heads, room + engine.pad_to, shape.head_dim)
        if held + room > engine.config.capacity_tokens:
            raise CapacityError(
                f"{held} tokens of memory and {room} of a query and its answer are more than capacity_tokens="
                f"{engine.config.capacity_tokens}. Raise it, or ask for fewer max_new_tokens."
            )
        self.own_k, self.own_v = (torch.zeros(size, dtype=engine.dtype, device=engine.device) for _ in "kv")
        self.lengths_B = torch.zeros(batch, dtype=torch.long, device=engine.device)

    @torch.inference_mode()
    def extend(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """Appends new ids to each answer. Returns the logits after them, (batch, vocab).

        Shorter rows are padded at the end. Padding is never attended to, and the next tokens overwrite it.
        """
        engine, run = self.engine, self.engine.run
        new = engine.padded(max(map(len, ids)))
        padded = [[*row, *(0 for _ in range(new - len(row)))] for row in ids]
        ids_BS, real_B = (torch.tensor(rows, device=engine.device) for rows in (padded, [len(row) for row in ids]))
        at_BS = self.lengths_B[:, None] + torch.arange(new, device=engine.device)
        cos, sin = (table[self.held + at_BS][:, :, None] for table in (run.cos_TD, run.sin_TD))
        x_BSC = run.embedded(ids_BS)
        added_BSC = torch.zeros_like(x_BSC)
        held_1, lengths_B = self.lengths_B.new_tensor([self.held]).int(), (self.lengths_B + new).int()
        # One or more answers, one or more tokens, the last layer or not: more variants than torch's default limit of 8.
        with engine.turn(), torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            buffer = engine.take(self.memory).buffer
            for i, (w, (k, v), turn) in enumerate(zip(run.layers, buffer.layers, run.turns(cos, sin), strict=True)):
                x_BSC, added_BSC = run.layer_of_batch(
                    x_BSC,
                    added_BSC,
                    *turn,
                    k,
                    v,
                    held_1,
                    self.own_k[i],
                    self.own_v[i],
                    at_BS,
                    lengths_B,
                    real_B - 1 if i == len(run.layers) - 1 else None,
                    w,
                    run.shape,
                )
        # A row whose answer has ended goes on with the others, in the rows behind its room, which nobody reads.
        self.lengths_B = (self.lengths_B + real_B).clamp(max=self.room)
        return run.logits(x_BSC + added_BSC)[:, 0]
