"""What a compacted memory has to compute, by another way: the whole memory, with scores hidden in the attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from kvmem import KVCacheItem
from kvmem.cache import dynamic_cache
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.models import prefill

Chosen = Sequence[Sequence[torch.Tensor]]
"""By layer, for each KV head: the positions that are kept."""


class Hiding(TorchFunctionMode):
    """Inside, attention of this thread sees only the chosen ones of a memory's first `tokens` tokens.

    It is computed in plain steps, layer after layer, whatever mask the model made.
    """

    def __init__(self, chosen: Chosen, tokens: int) -> None:
        super().__init__()
        self.chosen, self.tokens, self.layer = chosen, tokens, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        queries, keys, values = args[:3]
        heads = self.chosen[self.layer % len(self.chosen)]
        self.layer += 1
        groups = queries.shape[1] // len(heads)
        if keys.shape[1] < queries.shape[1]:
            keys, values = (tensor.repeat_interleave(groups, dim=1) for tensor in (keys, values))
        scores = queries @ keys.transpose(-1, -2) * kwargs["scale"]
        new = queries.shape[2]
        held = keys.shape[2] - new
        scores.masked_fill_(torch.ones(new, held + new, dtype=torch.bool).triu(held + 1), -torch.inf)
        for head in range(queries.shape[1]):
            hidden = torch.ones(self.tokens, dtype=torch.bool)
            hidden[heads[head // groups]] = False
            scores[:, head, :, : self.tokens].masked_fill_(hidden, -torch.inf)
        return scores.softmax(-1) @ values


@torch.inference_mode()
def logits_with(
    backend: HFBackend, item: KVCacheItem, ids: Sequence[int], chosen: Chosen | None = None
) -> torch.Tensor:
    """The logits behind `ids`, and behind one token more, (2, vocab), after the item; with the positions `chosen` of it
    alone, by `Hiding`."""
    view = dynamic_cache.view_of(item.kv_cache, item.metadata.tokens, backend.model_config)
    if chosen is None:
        return torch.stack([prefill(backend.model, ids, view), prefill(backend.model, ids[:1], view)])
    with Hiding(chosen, item.metadata.token_count):
        return torch.stack([prefill(backend.model, ids, view), prefill(backend.model, ids[:1], view)])
