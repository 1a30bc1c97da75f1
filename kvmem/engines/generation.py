"""Answers: their settings, sampling, and streaming as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated_dataclass
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kvmem.errors import ConfigError, check_kind


@dataclass(frozen=True)
class Generation:
    """An answer: its text and tokens, without the end token, and how many prompt tokens came from the cache."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    note: str = ""
    """In a scheduler's answer: why a stored memory was prefilled all the same; "" otherwise."""
    lossy: str = ""
    """The form to which the memory's KV had been quantized ("int8"); "" if it is as it was built."""


@validated_dataclass(config=ConfigDict(extra="forbid"), frozen=True)
class Sampling:
    """temperature 0: greedy. Otherwise temperature, top_k (0: all) and top_p (1: all) apply, and `seed` draws."""

    temperature: float = Field(default=0.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    seed: int = 0


def check_generation(max_new_tokens: int, sampling: Sampling | None) -> None:
    """Raises ConfigError for fewer than 1 token, and ArgumentError for arguments of the wrong type."""
    check_kind("max_new_tokens", max_new_tokens, Integral, way_out="Give a whole number, 1 or more.")
    check_kind("sampling", sampling, Sampling, type(None), way_out="Give Sampling(temperature=...); None is greedy.")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}. Ask for 1 or more.")


class Sampler:
    """Draws the tokens of one answer, with a generator of its own so that threads do not affect each other."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.greedy = sampling.temperature == 0.0
        if self.greedy:
            return
        self.generator = torch.Generator(device=device).manual_seed(sampling.seed)
        self.warpers: Any = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
        if sampling.top_k:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))

    def pick(self, logits_V: torch.Tensor) -> int:
        """The next token id, on the host. Waits for the device."""
        if self.greedy:
            return int(logits_V.argmax())
        no_ids_BT = torch.empty(1, 0, dtype=torch.long, device=logits_V.device)  # these warpers do not read the ids
        probabilities_V = self.warpers(no_ids_BT, logits_V[None].float())[0].softmax(-1)
        return int(torch.multinomial(probabilities_V, 1, generator=self.generator))


@dataclass(frozen=True)
class Token:
    """One token of a streamed answer. `text` is what it adds: nothing inside a character of several tokens."""

    id: int
    text: str


def as_text(token_ids: Iterable[int], decode: Callable[[Sequence[int]], str], max_new_tokens: int) -> Iterator[Token]:
    """Streams the text of each token; together the texts are `decode` of all tokens.

    Decodes all tokens so far each time, because a token's text can depend on those before it. An incomplete character
    is withheld unless the answer ends with it.
    """
    ids: list[int] = []
    shown = ""
    for token in token_ids:
        ids.append(token)
        text = decode(ids)
        incomplete = text.endswith("\N{REPLACEMENT CHARACTER}") and len(ids) < max_new_tokens
        added = "" if incomplete else text[len(shown) :]
        shown += added
        yield Token(token, added)
