"""Picks the next token from logits: greedy, or sampled through transformers' own warpers."""

from __future__ import annotations

from numbers import Integral

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kvmem.errors import ConfigError, check_kind


@dataclass(config=ConfigDict(extra="forbid"), frozen=True)
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
