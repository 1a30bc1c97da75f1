"""An answer, as every engine of this process gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated_dataclass
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kvmem.cache import CacheView
from kvmem.errors import ConfigError, check_kind
from kvmem.prompt import TokenizedPrompt


@dataclass(frozen=True)
class Generation:
    """An answer: its text and tokens (without the end token), and how many prompt tokens came from the cache."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    note: str = ""
    """Why a memory that is stored was prefilled all the same (a scheduler's answer); "" if there is nothing to tell."""
    lossy: str = ""
    """What the memory's keys and values had been compressed to ("int8"); "": they were the bits that were built."""


def told_of(prompt: TokenizedPrompt, kv_cache: CacheView | None) -> dict[str, str]:
    """What an answer says of the cache that it came from."""
    if kv_cache is None:
        return {}
    return {"note": kv_cache.note, "lossy": kv_cache.lossy if prompt.memory_ids else ""}


@validated_dataclass(config=ConfigDict(extra="forbid"), frozen=True)
class Sampling:
    """temperature 0: greedy. Otherwise temperature, then top_k (0: all), then top_p (1: all), drawn with `seed`."""

    temperature: float = Field(default=0.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    seed: int = 0


def check_asked(max_new_tokens: int, sampling: Sampling | None) -> None:
    """Raises ConfigError for less than 1 token, ArgumentError for what is no number, or no Sampling."""
    check_kind("max_new_tokens", max_new_tokens, Integral, way_out="Give a whole number, 1 or more.")
    check_kind("sampling", sampling, Sampling, type(None), way_out="Give Sampling(temperature=...); None is greedy.")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}. Ask for 1 or more.")


class Sampler:
    """One answer's draws; its generator is its own, so answers on several threads don't disturb one another."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.greedy = sampling.temperature == 0.0
        if self.greedy:
            return
        self.generator = torch.Generator(device=device).manual_seed(sampling.seed)
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
        if sampling.top_k:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))

    def pick(self, logits_V: torch.Tensor) -> int:
        """The next token id, on the host; waits for the device."""
        if self.greedy:
            return int(logits_V.argmax())
        none_BT = torch.empty(1, 0, dtype=torch.long, device=logits_V.device)  # warpers take ids and don't read them
        probabilities_V = self.warpers(none_BT, logits_V[None].float())[0].softmax(-1)  # type: ignore[arg-type]
        return int(torch.multinomial(probabilities_V, 1, generator=self.generator))


@dataclass(frozen=True)
class Token:
    """One token of an answer as it is streamed: `text` is what it adds (empty inside a character of several tokens)."""

    id: int
    text: str


def as_text(token_ids: Iterable[int], decode: Callable[[Sequence[int]], str], max_new_tokens: int) -> Iterator[Token]:
    """Decodes all tokens so far at each one, for a token's text can depend on those before. A character that is still
    incomplete is held back, unless the answer ends there: the texts together are `decode` of all tokens."""
    ids: list[int] = []
    shown = ""
    for token in token_ids:
        ids.append(token)
        text = decode(ids)
        half = text.endswith("\N{REPLACEMENT CHARACTER}") and len(ids) < max_new_tokens
        added = "" if half else text[len(shown) :]
        shown += added
        yield Token(token, added)
