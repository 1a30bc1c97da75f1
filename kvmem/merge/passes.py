"""Two ways to recompute single tokens of a cache in place, each attending to everything before it.

`by_mask` is one forward pass with a mask that says what each token attends to. `by_runs` is one pass for each run of
consecutive tokens, behind what the cache holds before it; the model makes its own masks and positions then, so it is
right for more models (ALiBi), and slower where the tokens are scattered.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from kvmem.cache import KV, LayersComputed, dynamic_cache
from kvmem.models import decoder_of

Pass = Callable[[PreTrainedModel, Sequence[int], Sequence[KV], Sequence[int]], None]
"""(model, token ids, layers, positions): overwrites keys and values at the positions, which are sorted.

layers: keys and values of all tokens, each (1, kv_heads, tokens, head_dim), for all of the model's layers or only the
first ones; the computation ends with these.
"""


@torch.inference_mode()
def by_mask(model: PreTrainedModel, token_ids: Sequence[int], layers: Sequence[KV], positions: Sequence[int]) -> None:
    """One forward pass over all of the tokens."""
    at_S = torch.tensor(positions, device=model.device)
    tokens = len(token_ids)
    windows = [window if window and window < tokens else None for window in dynamic_cache.windows_of(model.config)]
    types = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    masks = {window: _mask(at_S, tokens, window, model.dtype) for window in set(windows)}
    by_kind = {kind: masks[window] for kind, window in zip(types, windows, strict=False)}
    # Where layers differ, transformers takes one mask for each kind of them, by its name.
    arguments: dict[str, Any] = {"attention_mask": masks[windows[0]] if len(masks) == 1 else by_kind}
    if takes_positions(model):
        arguments["position_ids"] = at_S[None]
    cache = dynamic_cache.patched(layers, at_S, dynamic_cache.layer_count(model.config))
    _run(model, torch.tensor([token_ids], device=model.device)[:, at_S], cache, arguments)


@torch.inference_mode()
def by_runs(model: PreTrainedModel, token_ids: Sequence[int], layers: Sequence[KV], positions: Sequence[int]) -> None:
    """One forward pass for each run of consecutive tokens, from the first to the last."""
    runs: list[list[int]] = []
    for position in positions:
        if runs and runs[-1][-1] == position - 1:
            runs[-1].append(position)
        else:
            runs.append([position])
    for run in runs:
        cache = dynamic_cache.continued(layers, run[0], dynamic_cache.layer_count(model.config))
        _run(model, torch.tensor([[token_ids[position] for position in run]], device=model.device), cache, {})


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the model's decoder can be told the positions of its tokens."""
    return "position_ids" in inspect.signature(decoder_of(model).forward).parameters


def _mask(at_S: torch.Tensor, tokens: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """What the tokens at `at` attend to, (1, 1, new, tokens): 0, or the lowest value where they don't."""
    before_T = torch.arange(tokens, device=at_S.device)
    hidden_ST = before_T > at_S[:, None]
    if window is not None:
        hidden_ST |= before_T <= at_S[:, None] - window
    mask_ST = torch.zeros(hidden_ST.shape, dtype=dtype, device=at_S.device)
    return mask_ST.masked_fill_(hidden_ST, torch.finfo(dtype).min)[None, None]


def _run(model: PreTrainedModel, ids_1S: torch.Tensor, cache: Any, arguments: dict[str, Any]) -> None:
    try:
        decoder_of(model)(input_ids=ids_1S, past_key_values=cache, use_cache=True, **arguments)
    except LayersComputed:
        return  # the layers that were asked for
