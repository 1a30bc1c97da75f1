"""A direct arm that is slower than it needs to be."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from experiments.measurement import ttft
from kvmem.engines.base import FirstToken
from kvmem.engines.huggingface import HFBackend
from kvmem.engines.huggingface import backend as hf
from kvmem.prompt import TokenizedPrompt
from tests.mutations.mutation import SMOLLM2, Mutation, Patch, first_token_without_cache

KIND = "baseline"
SLOW = "baseline is too slow|the direct arm took|the build took"


def direct_slower(times: float) -> Patch:
    def body(first_token: Callable[..., FirstToken], backend: Any, prompt: Any) -> FirstToken:
        started = time.perf_counter()
        found = first_token(backend, prompt)
        time.sleep((times - 1) * (time.perf_counter() - started))
        return found

    return Patch(HFBackend, "first_token", first_token_without_cache(body))


def build_slower(times: float, calls: tuple[int, ...] = ()) -> Patch:
    """Every build, or those of `calls`, counted from 0, says that it took `times` as long."""

    def make(original: Any) -> Any:
        count = 0

        def build_tokens(backend: Any, *given: Any, **named: Any) -> Any:
            nonlocal count
            item = original(backend, *given, **named)
            if not calls or count in calls:
                longer = {"build_s": times * item.metadata.build_s}
                item = replace(item, metadata=item.metadata.model_copy(update=longer))
            count += 1
            return item

        return build_tokens

    return Patch(HFBackend, "build_tokens", make)


def _all_logits(original: Any) -> Any:
    @torch.inference_mode()
    def prefill(model: Any, token_ids: Any, cache: Any) -> torch.Tensor:
        if cache.get_seq_length():
            return original(model, token_ids, cache)  # type: ignore[no-any-return]
        ids = torch.tensor([token_ids], device=model.device)
        logits: torch.Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        return logits[0, -1]

    return prefill


def _longer(first_token: Any, backend: Any, prompt: Any) -> FirstToken:
    found: FirstToken = first_token(backend, TokenizedPrompt((), (*prompt.ids[:64], *prompt.ids)))
    return found


def _computed_twice(first_token: Any, backend: Any, prompt: Any) -> FirstToken:
    first_token(backend, prompt)
    found: FirstToken = first_token(backend, prompt)
    return found


def _longer_prompt(original: Any) -> Any:
    def direct_prompt(*given: Any) -> Any:
        prompt = original(*given)
        return TokenizedPrompt((), (*prompt.ids[:64], *prompt.ids))

    return direct_prompt


def _direct(name: str, expected: str, *patches: Patch) -> Mutation:
    return Mutation(KIND, name, expected, patches, SMOLLM2)


MUTATIONS = [
    _direct("the direct arm is 10% slower", SLOW, direct_slower(1.1)),
    _direct("the direct arm is 30% slower", SLOW, direct_slower(1.3)),
    _direct("direct arm and build are 3 times slower", SLOW, direct_slower(3), build_slower(3)),
    _direct("the direct arm is 5 and the build 10 times slower", SLOW, direct_slower(5), build_slower(10)),
    _direct("the cold prefill computes all logits", SLOW, Patch(hf, "prefill", _all_logits)),
    _direct(
        "the direct arm computes 64 tokens more",
        "tokens entered the model",
        Patch(HFBackend, "first_token", first_token_without_cache(_longer)),
    ),
    _direct(
        "the direct prompt has 64 tokens more", "different token ids", Patch(ttft, "direct_prompt", _longer_prompt)
    ),
    _direct(
        "the direct arm computes its prompt twice",
        "tokens entered the model",
        Patch(HFBackend, "first_token", first_token_without_cache(_computed_twice)),
    ),
]
