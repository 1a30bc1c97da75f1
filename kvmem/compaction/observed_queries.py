"""What follows a memory, layer by layer, while the model repeats it: queries, and their own keys and values.

One forward pass over the tokens that ask to repeat the memory, and over its text as the answer. Attention is watched
where transformers calls torch's `scaled_dot_product_attention`, so queries have every rotation and norm that the model
gives them. Calls of other threads are not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from kvmem.cache import KV, dynamic_cache
from kvmem.errors import CompactionError
from kvmem.models import max_positions, prefill

QUERIES_AT_ONCE = 512
"""How many tokens' scores are in memory at once."""


@dataclass(frozen=True)
class Behind:
    """What one layer computes of the tokens behind a memory."""

    queries_HGTD: torch.Tensor
    """By KV head and query head of its group, (kv_heads, groups, tokens, head_dim), fp32, as they meet the keys."""
    keys_HTD: torch.Tensor
    values_HTD: torch.Tensor
    scale: float
    """What scores are multiplied by."""

    def of_head(self, head: int) -> torch.Tensor:
        """All queries of one KV head, scaled, (groups · tokens, head_dim)."""
        return self.queries_HGTD[head].flatten(0, 1) * self.scale

    def attention(self, head: int, keys_SD: torch.Tensor, bias_S: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """The attention of this head's tokens to a memory of these keys, and to the tokens behind it up to themselves,
        (groups, tokens, entries + all tokens), for some tokens after the others.

        bias: what is added to the scores of the memory's entries, (entries,).
        """
        new = self.keys_HTD.shape[1]
        own_TD, memory_SD = self.keys_HTD[head].float(), keys_SD.float()
        for start in range(0, new, QUERIES_AT_ONCE):
            queries_GTD = self.queries_HGTD[head, :, start : start + QUERIES_AT_ONCE] * self.scale
            to_memory = queries_GTD @ memory_SD.T
            if bias_S is not None:
                to_memory += bias_S
            to_own = queries_GTD @ own_TD.T
            later = torch.ones(to_own.shape[1:], dtype=torch.bool, device=to_own.device).triu(start + 1)
            yield torch.cat([to_memory, to_own.masked_fill_(later, -torch.inf)], dim=-1).softmax(-1)


See = Callable[[int, Behind], torch.Tensor | None]
"""Called with each layer's number and what it computes. May return what its attention shall give instead, (kv_heads,
groups, tokens, head_dim)."""


class _Watching(TorchFunctionMode):
    """Inside, the attention of this thread is shown to `see`."""

    def __init__(self, layers: Sequence[KV], see: See) -> None:
        super().__init__()
        self.layers, self.see, self.layer = layers, see, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention or len(args) < 3 or self.layer >= len(self.layers):
            return func(*args, **kwargs)
        queries, keys, values = args[:3]
        stored = self.layers[self.layer][0]
        heads, tokens = stored.shape[1:3]
        keys, values = (tensor[:, :: tensor.shape[1] // heads] for tensor in (keys, values))
        if keys.shape[:2] != stored.shape[:2] or not torch.equal(keys[:, :, :tokens], stored):
            return func(*args, **kwargs)  # not the attention to the memory
        scale = kwargs.get("scale")
        behind = Behind(
            queries[0].float().unflatten(0, (heads, -1)),
            keys[0, :, tokens:],
            values[0, :, tokens:],
            queries.shape[-1] ** -0.5 if scale is None else float(scale),
        )
        instead = self.see(self.layer, behind)
        self.layer += 1
        return func(*args, **kwargs) if instead is None else instead.flatten(0, 1)[None].to(queries.dtype)


@torch.inference_mode()
def observe(
    model: PreTrainedModel, layers: Sequence[KV], prompt_ids: Sequence[int], text_ids: Sequence[int], see: See
) -> None:
    """Shows `see` each layer, first to last, while the model is given the prompt and the text behind a memory.

    A text that does not fit the model's positions behind the memory is cut off: as many of its tokens are given as fit.

    Raises CompactionError if the model's attention can't be watched, or if it has no positions left.
    """
    tokens = layers[0][0].shape[-2]
    room = max_positions(model.config.get_text_config(decoder=True)) - tokens
    ids = (*prompt_ids, *text_ids)[: max(room, 0)]
    if len(ids) <= len(prompt_ids):
        raise CompactionError(
            f"This strategy has the model repeat the memory, and behind its {tokens} tokens the model has {room} "
            "positions. Use Knorm, KeyDiff or StreamingLLM, or split the text into memories."
        )
    watching = _Watching(layers, see)
    with watching:
        prefill(model, ids, dynamic_cache.from_layers(layers, model.config.get_text_config(decoder=True)))
    if watching.layer != len(layers):
        raise CompactionError(
            f"This strategy looks at queries, and the attention of {model.config.model_type} with "
            f"attn_implementation={model.config._attn_implementation} can't be watched. Open the model with sdpa, or "
            "use Knorm, KeyDiff or StreamingLLM."
        )
