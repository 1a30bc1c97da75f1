"""Every method of injecting a stored memory before a query, with the same weights."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from experiments import baselines
from experiments.measurement import Sample, Trace, synchronize, ttft
from experiments.results import ALONE, DIRECT, DIRECT_EAGER, GRAPH, IN_PLACE
from kvmem.cache import KVCacheItem
from kvmem.engines import FirstToken
from kvmem.engines.graph import Engine, HFGraphBackend
from kvmem.engines.huggingface import HFBackend
from kvmem.prompt import TokenizedPrompt


@dataclass(frozen=True)
class InjectionMethod:
    """One injection method for one memory and query."""

    first_token: Callable[[str], Sample]
    """Measures one sample of a question, from token ids. engine_s includes passing the cache to the model."""
    trace: Callable[[int], Trace] | None
    """A greedy answer of the given length to the first question; None if it does not answer the whole prompt."""
    baseline: str
    """The name of the direct arm that grades the answer.

    It runs on the same engine, because the kernels of another engine round differently.
    """


def injection_methods(
    backend: HFGraphBackend, item: KVCacheItem, prompts: Mapping[str, TokenizedPrompt]
) -> dict[str, InjectionMethod]:
    """By name, on the backend's weights: those of the graph engine, of the eager forward, and every baseline recipe.

    prompts: of each question that is timed, split after the memory. The first one's answer is the one that is graded.
    """
    whole = {question: TokenizedPrompt((), prompt.ids) for question, prompt in prompts.items()}
    alone = {question: TokenizedPrompt((), prompt.query_ids) for question, prompt in prompts.items()}
    fast, cache = backend.engine, item.kv_cache
    methods = {
        DIRECT: _graph_method(backend, fast, None, whole),
        DIRECT_EAGER: _eager_direct(backend.eager, whole),
        ALONE: dataclasses.replace(_graph_method(backend, fast, None, alone), trace=None),
    }
    if fast.graph_up_to:
        knobs = dataclasses.replace(fast.config, graph_up_to=0, buffers=1, warm_tokens=())
        methods[IN_PLACE] = _graph_method(backend, Engine(backend.model, knobs), cache, prompts)
        methods[GRAPH] = _graph_method(backend, fast, cache, prompts)
    else:
        methods[IN_PLACE] = _graph_method(backend, fast, cache, prompts)
    for name, recipe in baselines.recipes().items():
        methods[name] = _recipe_method(recipe(item, backend.model_config), backend.eager, prompts)
    return methods


def _graph_method(
    backend: HFGraphBackend, engine: Engine, cache: DynamicCache | None, prompts: Mapping[str, TokenizedPrompt]
) -> InjectionMethod:
    graded = _first(prompts)

    def trace(steps: int) -> Trace:
        logits_V, answer = engine.begin(cache, len(graded.memory_ids), graded.query_ids)
        logits = [logits_V]
        for _ in range(steps - 1):
            logits.append(engine.extend(answer, (int(logits[-1].argmax()),)))
        return Trace(tuple(int(row_V.argmax()) for row_V in logits), torch.stack(logits).float().cpu())

    def first_token(prompt: TokenizedPrompt) -> FirstToken:
        held = len(prompt.memory_ids)
        token, logits_V = engine.first_token(cache, held, prompt.query_ids)
        return FirstToken(token, held, logits_V=logits_V)

    return InjectionMethod(_timed(engine.device, prompts, first_token), trace, DIRECT)


def _recipe_method(
    recipe: baselines.Recipe, backend: HFBackend, prompts: Mapping[str, TokenizedPrompt]
) -> InjectionMethod:
    graded = _first(prompts)

    def first_token(question: str) -> Sample:
        sample = recipe.first_token(backend, prompts[question])
        return dataclasses.replace(sample, engine_s=sample.user_s, cache_s=0.0)

    return InjectionMethod(first_token, lambda steps: recipe.trace(backend, graded, steps), DIRECT_EAGER)


def _eager_direct(backend: HFBackend, whole: Mapping[str, TokenizedPrompt]) -> InjectionMethod:
    graded = _first(whole)
    return InjectionMethod(
        _timed(backend.device, whole, backend.first_token),
        lambda steps: ttft.trace(backend, graded, None, steps),
        DIRECT_EAGER,
    )


def _timed(
    device: torch.device, prompts: Mapping[str, TokenizedPrompt], first_token: Callable[[TokenizedPrompt], FirstToken]
) -> Callable[[str], Sample]:
    def sample(question: str) -> Sample:
        prompt = prompts[question]
        memory_tokens = len(prompt.memory_ids)
        synchronize(device)
        started = time.perf_counter()
        token = first_token(prompt)
        seconds = time.perf_counter() - started
        return Sample(seconds, seconds, 0.0, token, prompt, memory_tokens)

    return sample


def _first(prompts: Mapping[str, TokenizedPrompt]) -> TokenizedPrompt:
    return next(iter(prompts.values()))
