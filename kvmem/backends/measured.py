"""What a measurement asks of an engine beyond answers: a first token, an answer's logits, and what rounding does."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kvmem.backends import Backend
from kvmem.backends.lent_file import LentFile
from kvmem.dynamic_cache import LentCache
from kvmem.prompt import Query, TokenizedPrompt

Lent = LentCache | LentFile
"""What `get_cache` gives, on one engine or another."""


@dataclass(frozen=True)
class FirstToken:
    """One greedy token, and the engine's own count of prompt tokens that it did not compute for it.

    `local_tokens` came from the engine's prefix cache, the others from the memory.
    """

    id: int
    cached_tokens: int
    local_tokens: int = 0


@dataclass(frozen=True, eq=False)
class GreedyAnswer:
    """Greedy tokens past any end token, and the logits, (steps, vocab), that gave each.

    Where an engine tells its largest log-probabilities only, `complete` is False and all others are -inf: differences
    between two tokens are the logits', equality to the bit can't be told.
    """

    token_ids: tuple[int, ...]
    logits_SV: torch.Tensor
    complete: bool = True


class MeasuredBackend(Backend):
    """An engine that experiments can measure."""

    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    compute_device: torch.device
    """Where it computes; `device` is where items lie."""
    ranks: int = 1
    """GPUs that share the work."""
    prefix_block_tokens: int | None = None
    """Tokens of a block of the engine's own prefix cache; None: it has none."""
    attention: str
    """The attention kernel's name."""

    @abstractmethod
    def split(self, query: Query, kv_cache: Any = None) -> TokenizedPrompt:
        """The prompt of `query`, split at what `kv_cache` holds of it; PromptError if it is too long."""

    @abstractmethod
    def first_token(self, prompt: TokenizedPrompt, kv_cache: Any = None) -> FirstToken:
        """The first greedy token, on the host. With a cache, only what it does not hold is computed."""

    @abstractmethod
    def greedy(self, prompt: TokenizedPrompt, kv_cache: Any, steps: int) -> GreedyAnswer:
        """`steps` greedy tokens, with the logits that gave each."""

    @abstractmethod
    def two_chunkings(self, token_ids: Sequence[int], at: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The last token's logits, (vocab,), of a plain prompt prefilled whole, and in two parts that meet at token
        `at` or as near to it as the engine can: what lies between the two is rounding. No stored memory has a part in
        it. -inf where the engine does not tell them."""

    def held_tokens(self, prompt: TokenizedPrompt, kv_cache: Any) -> int:
        """How many of the prompt's tokens an answer behind `kv_cache` must not compute: exactly so many, or no hit."""
        return len(prompt.memory_ids)

    def reset(self) -> None:
        """Empties what the engine keeps of earlier prompts by itself; this one keeps nothing."""

    @abstractmethod
    def conditions(self) -> dict[str, Any]:
        """What the engine's figures depend on: its version, graphs, sizes. Plain JSON."""
