"""Every method of injecting a stored memory before a query, with the same weights."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from experiments import baselines
from experiments.measurement import Sample, Trace, synchronize, ttft
from experiments.results import ALONE, DIRECT, DIRECT_EAGER, GRAPH, IN_PLACE
from kvmem.cache import KVCacheItem
from kvmem.engines import FirstToken, MeasuredBackend
from kvmem.engines.graph import Engine, HFGraphBackend
from kvmem.engines.huggingface import HFBackend
from kvmem.prompt import Query, TokenizedPrompt


@dataclass(frozen=True)
class InjectionMethod:
    """One injection method for one memory and query."""

    first_token: Callable[[], Sample]
    """Measures one sample, from token ids to the first token. engine_s includes passing the cache to the model."""
    trace: Callable[[int], Trace] | None
    """A greedy answer with the given number of tokens; None if the method does not answer the whole prompt."""
    engine: MeasuredBackend
    baseline: str
    """The name of the direct arm that grades the answer.

    It runs on the same engine, because the kernels of another engine round differently.
    """


def injection_methods(backend: HFGraphBackend, item: KVCacheItem, question: Query) -> dict[str, InjectionMethod]:
    """Every injection method by name: those of the graph engine, of the eager forward, and the baseline recipes.

    All use the backend's weights.
    """
    prompt = backend.template.split(item.metadata.tokens, question)
    whole, alone = TokenizedPrompt((), prompt.ids), TokenizedPrompt((), prompt.query_ids)
    fast, cache = backend.engine, item.kv_cache
    methods = {
        DIRECT: _graph_method(backend, fast, None, whole),
        DIRECT_EAGER: _eager_direct(backend.eager, whole),
        ALONE: dataclasses.replace(_graph_method(backend, fast, None, alone), trace=None),
    }
    if fast.graph_up_to:
        knobs = dataclasses.replace(fast.config, graph_up_to=0, buffers=1, warm_tokens=())
        methods[IN_PLACE] = _graph_method(backend, Engine(backend.model, knobs), cache, prompt)
        methods[GRAPH] = _graph_method(backend, fast, cache, prompt)
    else:
        methods[IN_PLACE] = _graph_method(backend, fast, cache, prompt)
    for name, recipe in baselines.recipes().items():
        methods[name] = _recipe_method(recipe(item, backend.model_config), backend.eager, prompt)
    return methods


def _graph_method(
    backend: HFGraphBackend, engine: Engine, cache: DynamicCache | None, prompt: TokenizedPrompt
) -> InjectionMethod:
    memory_tokens, ids = len(prompt.memory_ids), prompt.query_ids

    def trace(steps: int) -> Trace:
        logits_V, answer = engine.begin(cache, memory_tokens, ids)
        logits = [logits_V]
        for _ in range(steps - 1):
            logits.append(engine.extend(answer, (int(logits[-1].argmax()),)))
        return Trace(tuple(int(row_V.argmax()) for row_V in logits), torch.stack(logits).float().cpu())

    def token() -> int:
        return engine.first_token(cache, memory_tokens, ids)

    return InjectionMethod(lambda: _sample(engine.device, prompt, token), trace, backend, DIRECT)


def _recipe_method(recipe: baselines.Recipe, backend: HFBackend, prompt: TokenizedPrompt) -> InjectionMethod:
    def first_token() -> Sample:
        sample = recipe.first_token(backend, prompt)
        return dataclasses.replace(sample, engine_s=sample.user_s)

    return InjectionMethod(first_token, lambda steps: recipe.trace(backend, prompt, steps), backend, DIRECT_EAGER)


def _eager_direct(backend: HFBackend, whole: TokenizedPrompt) -> InjectionMethod:
    def trace(steps: int) -> Trace:
        return ttft.trace(backend, whole, None, steps)

    return InjectionMethod(
        lambda: _sample(backend.device, whole, lambda: backend.first_token(whole).id), trace, backend, DIRECT_EAGER
    )


def _sample(device: torch.device, prompt: TokenizedPrompt, run: Callable[[], int]) -> Sample:
    memory_tokens = len(prompt.memory_ids)
    synchronize(device)
    started = time.perf_counter()
    token = run()
    seconds = time.perf_counter() - started
    return Sample(seconds, seconds, 0.0, FirstToken(token, memory_tokens), prompt, memory_tokens)
