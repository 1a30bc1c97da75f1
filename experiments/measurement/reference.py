"""What code that shares nothing with the engine under test computes for a prompt: its logits, its KV and its time.

Rounding noise, equality and the baseline's speed are judged against it, so that a fault in an engine's own prefill
can't excuse itself. For engines of this process it is transformers' own forward pass on the same weights, without a
cache. For vLLM it is `LLM.generate` on the whole prompt, with vLLM's prefix cache emptied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, PreTrainedModel

from kvmem.cache import ENTRIES, dynamic_cache

MATH_LIMIT_BYTES = 2**30
"""The plain attention kernel holds all scores of a layer at once; a prompt whose scores exceed this uses another."""
LONG_KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
NO_KERNEL = ("No available kernel", "No viable backend")
"""What torch says where none of the kernels that are asked for takes these inputs, on a GPU and on a CPU."""
T = TypeVar("T")
Layers = list[tuple[torch.Tensor, ...]]
"""What each layer keeps, (heads, tokens, size) each: keys and values, or a state as one token of one head."""


def comparable(cache: DynamicCache) -> Layers:
    """What the layers keep of the first sequence of the batch. Raises ChangedFileError as `contents_of`."""
    return [
        tuple(_by_token(name, tensor[0]) for name, tensor in kept.items()) for kept in dynamic_cache.contents_of(cache)
    ]


def _by_token(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name not in ENTRIES:
        return tensor.reshape(1, 1, -1)
    return tensor if tensor.dim() == 3 else tensor[None]


@dataclass(frozen=True, eq=False)
class ReferenceLogits:
    """Logits of the same steps from several executions that differ by rounding alone.

    runs: (steps, vocab) each; the first one is what answers are compared with. steps: the answer's steps that they are
    of, counted from the first generated token.
    """

    runs: tuple[torch.Tensor, ...]
    steps: tuple[int, ...]

    @property
    def noise(self) -> float:
        """The largest absolute difference of a logit between two runs."""
        first_SV = self.runs[0]
        return max((max_abs_diff(first_SV, other_SV) for other_SV in self.runs[1:]), default=0.0)


class ReferenceForward(ABC):
    """The independent forward pass for one engine. `engine_adapters.reference_forward` finds it."""

    name: str
    """What it is, in a sentence of the report."""

    @abstractmethod
    def logits(self, prompt_ids: Sequence[int], answer_ids: Sequence[int], at: int | None) -> ReferenceLogits:
        """The logits that precede each of `answer_ids` behind the prompt.

        at: the step at which two answers differ, if they do; a reference that computes few steps includes it.
        """

    @abstractmethod
    def first_token(self, token_ids: Sequence[int]) -> int:
        """The first greedy token behind `token_ids`, on the host: the baseline that is timed."""

    def keys_values(self, token_ids: Sequence[int]) -> tuple[Layers, ...]:
        """The KV of `token_ids` from several executions; () if the engine's KV can't be read in this process."""
        return ()

    def prepare(self) -> None:
        """Empties what an engine has cached of earlier prompts, before a timed call. By default there is nothing."""
        return


class TransformersForward(ReferenceForward):
    """transformers' own forward pass on the engine's weights."""

    name = "transformers' own forward pass"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._last: tuple[tuple[tuple[int, ...], int], ReferenceLogits] | None = None

    @torch.inference_mode()
    def logits(self, prompt_ids: Sequence[int], answer_ids: Sequence[int], at: int | None) -> ReferenceLogits:
        """The last answer's logits are kept, because several arms are compared with the same direct answer."""
        ids, steps = (*prompt_ids, *answer_ids[:-1]), len(answer_ids)
        if self._last is not None and self._last[0] == (ids, steps):
            return self._last[1]
        runs = self._executions(len(ids), partial(self._logits, ids, steps))
        self._last = (ids, steps), ReferenceLogits(runs, tuple(range(steps)))
        return self._last[1]

    @torch.inference_mode()
    def first_token(self, token_ids: Sequence[int]) -> int:
        ids_BT = torch.tensor([tuple(token_ids)], device=self.model.device)
        return int(self.model(input_ids=ids_BT, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())

    @torch.inference_mode()
    def keys_values(self, token_ids: Sequence[int]) -> tuple[Layers, ...]:
        return self._executions(len(token_ids), partial(self._keys_values, token_ids))

    def _executions(self, tokens: int, run: Callable[[int], T]) -> tuple[T, ...]:
        """`run(rows)` with one row, with two rows, and with each other attention kernel that takes the prompt.

        Which kernel is the usual one depends on torch, and some have the same bits for any shape: on an H200, torch
        2.11 uses cuDNN's, two rows differ by nothing from one, and FlashAttention's differ as a cache does.
        """
        runs = [run(1), run(2)]
        for kernel in self._other_kernels(tokens):
            try:
                with sdpa_kernel([kernel]):
                    runs.append(run(1))
            except RuntimeError as error:
                if not str(error).startswith(NO_KERNEL):
                    raise
        return tuple(runs)

    def _logits(self, ids: Sequence[int], steps: int, rows: int) -> torch.Tensor:
        ids_BT = torch.tensor([tuple(ids)] * rows, device=self.model.device)
        logits_BSV: torch.Tensor = self.model(input_ids=ids_BT, use_cache=False, logits_to_keep=steps).logits
        return logits_BSV[0].float().cpu()

    def _keys_values(self, ids: Sequence[int], rows: int) -> Layers:
        ids_BT = torch.tensor([tuple(ids)] * rows, device=self.model.device)
        cache = dynamic_cache.empty(self.model.config)
        self.model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return comparable(cache)

    def _other_kernels(self, tokens: int) -> Sequence[SDPBackend]:
        """Other implementations of `scaled_dot_product_attention`; for a long prompt, the usual one may be among them.

        The plain one holds every score, so it is left to prompts whose scores fit. A model that does not use this
        function is not changed.
        """
        scores = 4 * int(self.model.config.num_attention_heads) * tokens**2
        return (SDPBackend.MATH,) if scores <= MATH_LIMIT_BYTES else LONG_KERNELS


def max_abs_diff(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference of the entries that are finite in both; 0 where there is none."""
    a, b = a.double().cpu(), b.double().cpu()
    finite = a.isfinite() & b.isfinite()
    return float((a[finite] - b[finite]).abs().max()) if bool(finite.any()) else 0.0
