"""Faults of the engine that runs a model's weights without its modules, so that no hook counts its tokens."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

from kvmem.cache import dynamic_cache
from kvmem.engines.graph import HFGraphBackend, kv_buffers
from kvmem.engines.graph.model import ModelRunner
from kvmem.prompt import TokenizedPrompt
from tests.mutations.mutation import Mutation, Patch, first_token_with_cache
from tests.mutations.ungraded import TIMED

KIND = "hf_graph"
PRODUCTS = "tokens passed through every layer"
GRAPH = ("backend=hf_graph",)


def _query_alone(first_token: Any, backend: Any, prompt: Any, cache: Any) -> Any:
    return replace(first_token(backend, TokenizedPrompt((), prompt.query_ids)), cached_tokens=len(prompt.memory_ids))


def _zero(first_token: Any, backend: Any, prompt: Any, cache: Any) -> Any:
    return replace(first_token(backend, prompt, cache), id=0)


def _no_hit(first_token: Any, backend: Any, prompt: Any, cache: Any) -> Any:
    return replace(first_token(backend, prompt, cache), cached_tokens=0)


def _query_from(start: float) -> Any:
    def body(first_token: Any, backend: Any, prompt: Any, cache: Any) -> Any:
        skipped = max(1, int(start * len(prompt.query_ids)))
        return first_token(backend, TokenizedPrompt(prompt.memory_ids, prompt.query_ids[skipped:]), cache)

    return body


def _remembers(first_token: Any, backend: Any, prompt: Any, cache: Any) -> Any:
    """The logits are kept from a call before the clock starts: each prompt is computed once, and then remembered."""
    if prompt.ids not in KNOWN:
        found = first_token(backend, prompt, cache)
        KNOWN[prompt.ids] = replace(found, logits_V=found.logits_V.clone())
    return KNOWN[prompt.ids]


def _layers_left_out(original: Any) -> Any:
    """A query passes through the first layer only."""

    def run(runner: Any, inputs: Any, buffer: Any, *given: Any) -> Any:
        layers, held = runner.layers, buffer.layers
        if inputs.shape[0] < 60:  # a query; the direct arm's prompt is longer
            runner.layers, buffer.layers = layers[:1], held[:1]
        try:
            return original(runner, inputs, buffer, *given)
        finally:
            runner.layers, buffer.layers = layers, held

    return run


KNOWN: dict[Any, Any] = {}


def _in_place_already(original: Any) -> Any:
    """Any memory counts as the one in the buffer's rows, so that rows of an earlier pass answer."""

    def place(buffer: Any, cache: Any, held: int) -> int:
        buffer.memory, buffer.intact = weakref.ref(dynamic_cache.layers_of(cache)[0][0]), held
        return 0

    return place


MUTATIONS = [
    Mutation(KIND, name, expected, (Patch(HFGraphBackend, "first_token", first_token_with_cache(body)),), GRAPH)
    for name, expected, body in (
        ("the query is answered without the memory", TIMED, _query_alone),
        ("token 0 is returned", TIMED, _zero),
        ("a hit is not told", "tokens came from the cache", _no_hit),
        ("half the query is computed", PRODUCTS, _query_from(0.5)),
        ("the query's first token is left out", PRODUCTS, _query_from(0.0)),
        ("each prompt's logits are remembered", PRODUCTS, _remembers),
    )
] + [
    Mutation(
        KIND, "any memory counts as in place", "a logit", (Patch(kv_buffers.Buffer, "place", _in_place_already),), GRAPH
    ),
    Mutation(KIND, "layers are left out", PRODUCTS, (Patch(ModelRunner, "__call__", _layers_left_out),), GRAPH),
]
