"""Timed calls that don't do the work that is graded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvmem.engines.base import FirstToken
from kvmem.engines.huggingface import HFBackend
from kvmem.prompt import TokenizedPrompt
from tests.mutations import wrong_kv
from tests.mutations.mutation import Mutation, Patch, first_token_with_cache, first_token_without_cache

KIND = "ungraded timing"
COUNTED = "tokens entered the model"
TIMED = "a logit of the timed|timed call returned another token|returned different tokens"


def remembered(original: Any) -> Any:
    known: dict[Any, FirstToken] = {}

    def body(first_token: Any, backend: Any, prompt: Any, cache: Any) -> FirstToken:
        if prompt.memory_ids not in known:
            known[prompt.memory_ids] = first_token(backend, prompt, cache)
        return known[prompt.memory_ids]

    return first_token_with_cache(body)(original)


def _remembered_and_counted(original: Any) -> Any:
    known: dict[Any, FirstToken] = {}

    def body(first_token: Any, backend: Any, prompt: Any, cache: Any) -> FirstToken:
        if prompt.memory_ids in known:
            first_token(backend, TokenizedPrompt((), prompt.query_ids))
        else:
            known[prompt.memory_ids] = first_token(backend, prompt, cache)
        return known[prompt.memory_ids]

    return first_token_with_cache(body)(original)


def _query_from(start: float) -> Any:
    def body(first_token: Any, backend: Any, prompt: Any, cache: Any) -> FirstToken:
        skipped = max(1, int(start * len(prompt.query_ids)))
        found: FirstToken = first_token(backend, TokenizedPrompt(prompt.memory_ids, prompt.query_ids[skipped:]), cache)
        return found

    return first_token_with_cache(body)


def _ignored(first_token: Any, backend: Any, prompt: Any, cache: Any) -> FirstToken:
    found: FirstToken = first_token(backend, TokenizedPrompt((), prompt.ids))
    return replace(found, cached_tokens=len(prompt.memory_ids))


def _query_alone(first_token: Any, backend: Any, prompt: Any, cache: Any) -> FirstToken:
    found: FirstToken = first_token(backend, TokenizedPrompt((), prompt.query_ids))
    return replace(found, cached_tokens=len(prompt.memory_ids))


def _zero(first_token: Any, backend: Any, prompt: Any, cache: Any) -> FirstToken:
    return replace(first_token(backend, prompt, cache), id=0)


def _reversed(first_token: Any, backend: Any, prompt: Any, cache: Any) -> FirstToken:
    turned = TokenizedPrompt(prompt.memory_ids, prompt.query_ids[::-1])
    found: FirstToken = first_token(backend, turned, cache)
    return found


def _twice(first_token: Any, backend: Any, prompt: Any, cache: Any) -> FirstToken:
    first_token(backend, TokenizedPrompt((), prompt.query_ids))
    found: FirstToken = first_token(backend, prompt, cache)
    return found


def _direct_half(first_token: Any, backend: Any, prompt: Any) -> FirstToken:
    found: FirstToken = first_token(backend, TokenizedPrompt((), prompt.ids[len(prompt.ids) // 2 :]))
    return found


def _greedy_without_cache(original: Any) -> Any:
    def greedy(backend: Any, prompt: Any, kv_cache: Any, steps: int) -> Any:
        return original(backend, TokenizedPrompt((), prompt.ids), None, steps)

    return greedy


def _timed(name: str, expected: str, make: Any) -> Mutation:
    return Mutation(KIND, name, expected, (Patch(HFBackend, "first_token", make),))


MUTATIONS = [
    _timed("a remembered token is returned", COUNTED, remembered),
    _timed("a remembered token is returned and the query counted", TIMED, _remembered_and_counted),
    _timed("half the query is computed", COUNTED, _query_from(0.5)),
    _timed("the query's first token is left out", COUNTED, _query_from(0.0)),
    _timed("the cache is ignored and its hit claimed", COUNTED, first_token_with_cache(_ignored)),
    _timed("the query is answered without the memory", TIMED, first_token_with_cache(_query_alone)),
    _timed("token 0 is returned", TIMED, first_token_with_cache(_zero)),
    _timed("the query is reversed", TIMED, first_token_with_cache(_reversed)),
    _timed("the query is computed twice", COUNTED, first_token_with_cache(_twice)),
    _timed("the direct arm computes half its prompt", COUNTED, first_token_without_cache(_direct_half)),
    Mutation(
        KIND,
        "graded without the cache, and the timed keys are wrong",
        TIMED,
        (Patch(HFBackend, "greedy", _greedy_without_cache), wrong_kv.viewed(wrong_kv.view_keys_rolled)),
    ),
]
