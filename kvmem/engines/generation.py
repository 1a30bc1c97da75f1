"""Answers: their settings, sampling, and streaming as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kvmem.errors import ConfigError, ModelError, check_kind, config_error

FinishReason = Literal["stop", "length", "context_length"]
"""Why an answer ended: at an end token, after `max_new_tokens`, or because there is no position for another token."""


@dataclass(frozen=True)
class Generation:
    """An answer: its text and tokens, without the end token, and how many prompt tokens came from the cache."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    finish_reason: FinishReason
    """"context_length": prompt and answer fill the model's positions, or the engine's smaller limit (`max_tokens`)."""
    note: str = ""
    """Why a stored memory was prefilled all the same; "" if it was not."""
    lossy: str = ""
    """The form to which the memory's KV had been quantized ("int8"); "" if it is as it was built."""


MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0
"""vLLM's own bounds, so that a value means the same on every engine: below the first it samples with the first instead,
and above the second it refuses."""
MAX_TOP_K, MAX_SEED = 2**31 - 1, 2**63 - 1
"""What every engine can take: vLLM's top_k has 32 bits, and torch's seeds have 64 with a sign."""


class Sampling(BaseModel):
    """How tokens are chosen. The same values are allowed on every engine, whatever it could do with others.

    temperature 0: greedy. Otherwise temperature (0.01 to 2), top_k (0: all) and top_p (1: all) apply, and `seed` (0
    to 2^63 - 1) draws: equal seeds give equal answers on one engine. Raises ConfigError for any other value or name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    temperature: float = Field(default=0.0, ge=0.0, le=MAX_TEMPERATURE)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0, le=MAX_TOP_K)
    seed: int = Field(default=0, ge=0, le=MAX_SEED)

    def __init__(self, **knobs: float) -> None:
        try:
            super().__init__(**knobs)
        except ValidationError as error:
            raise config_error("Sampling", error, type(self).model_fields) from None
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ConfigError(
                f"Sampling.temperature is {self.temperature:g}. Give 0, which is greedy, or {MIN_TEMPERATURE} or more."
            )


def finish_reason(generated: int, possible: int, requested: int) -> FinishReason:
    """Why an answer of `generated` tokens ended, if `possible` of the `requested` tokens had a position."""
    if generated < possible:
        return "stop"
    return "context_length" if possible < requested else "length"


def check_generation(max_new_tokens: int, sampling: Sampling | None) -> None:
    """Raises ConfigError for fewer than 1 token, and ArgumentError for arguments of the wrong type."""
    check_kind("max_new_tokens", max_new_tokens, Integral, way_out="Give a whole number, 1 or more.")
    check_kind("sampling", sampling, Sampling, type(None), way_out="Give Sampling(temperature=...); None is greedy.")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}. Ask for 1 or more.")


NOT_A_NUMBER = (
    "The model's logits are not numbers (NaN), so no token follows from them. Load it in a dtype of a larger range, "
    "such as bfloat16 instead of float16, or check its weights."
)


def greedy_token(logits_V: torch.Tensor) -> int:
    """The id of the largest logit, on the host. Waits for the device. Raises ModelError if a logit is NaN."""
    largest, token = logits_V.max(-1)
    if bool(largest.isnan()):  # for torch, NaN is the largest
        raise ModelError(NOT_A_NUMBER)
    return int(token)


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
            return greedy_token(logits_V)
        no_ids_BT = torch.empty(1, 0, dtype=torch.long, device=logits_V.device)  # these warpers do not read the ids
        probabilities_V = self.warpers(no_ids_BT, logits_V[None].float())[0].softmax(-1)
        if bool(probabilities_V.isnan().any()):
            raise ModelError(NOT_A_NUMBER)
        return int(torch.multinomial(probabilities_V, 1, generator=self.generator))


@dataclass(frozen=True)
class Token:
    """One token of a streamed answer. `text` is what it adds: nothing inside a character of several tokens."""

    id: int
    text: str
    finish_reason: FinishReason | None = None
    """On the last token, why no other follows: "length" or "context_length". None if it is followed by another, or by
    the end token, which is not streamed."""


def as_text(
    token_ids: Iterable[int], decode: Callable[[Sequence[int]], str], possible: int, requested: int
) -> Iterator[Token]:
    """Streams the text of each token; together the texts are `decode` of all tokens.

    At most `possible` tokens come, of `requested` ones: the others have no position. Decodes all tokens so far each
    time, because a token's text can depend on those before it. An incomplete character is withheld unless the answer
    ends with it.
    """
    ids: list[int] = []
    shown = ""
    for token in token_ids:
        ids.append(token)
        text = decode(ids)
        is_last = len(ids) == possible
        incomplete = text.endswith("\N{REPLACEMENT CHARACTER}") and not is_last
        added = "" if incomplete else text[len(shown) :]
        shown += added
        yield Token(token, added, finish_reason(len(ids), possible, requested) if is_last else None)
