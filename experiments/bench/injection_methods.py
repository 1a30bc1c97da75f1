"""Every way to bring a stored memory and a query together on one model's weights, each from token ids to the token."""

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
    """`first_token` takes one sample, whose engine_s holds the passing of the cache too. `trace` gives a longer answer
    of so many tokens; None: it is not the whole prompt's. `engine` ran it, and its own direct way, `beside`, is what
    the answer must be equal to: another engine's kernels round otherwise."""

    first_token: Callable[[], Sample]
    trace: Callable[[int], Trace] | None
    engine: MeasuredBackend
    beside: str


def ways(backend: HFGraphBackend, item: KVCacheItem, question: Query) -> dict[str, InjectionMethod]:
    """By name, on the backend's weights: the fast engine's, Hugging Face's, and every recipe."""
    prompt = backend.template.split(item.metadata.tokens, question)
    whole, alone = TokenizedPrompt((), prompt.ids), TokenizedPrompt((), prompt.query_ids)
    fast, cache = backend.engine, item.kv_cache
    found = {
        DIRECT: _on(backend, fast, None, whole),
        DIRECT_EAGER: _eager(backend.eager, whole),
        ALONE: dataclasses.replace(_on(backend, fast, None, alone), trace=None),
    }
    if fast.graph_up_to:
        knobs = dataclasses.replace(fast.knobs, graph_up_to=0, buffers=1, warm_tokens=())
        found[IN_PLACE] = _on(backend, Engine(backend.model, knobs), cache, prompt)
        found[GRAPH] = _on(backend, fast, cache, prompt)
    else:
        found[IN_PLACE] = _on(backend, fast, cache, prompt)
    for name, recipe in baselines.recipes().items():
        found[name] = _by(recipe(item, backend.model_config), backend.eager, prompt)
    return found


def _on(
    backend: HFGraphBackend, engine: Engine, cache: DynamicCache | None, prompt: TokenizedPrompt
) -> InjectionMethod:
    held, ids = len(prompt.memory_ids), prompt.query_ids

    def trace(steps: int) -> Trace:
        logits_V, answer = engine.begin(cache, held, ids)
        logits = [logits_V]
        for _ in range(steps - 1):
            logits.append(engine.extend(answer, (int(logits[-1].argmax()),)))
        return Trace(tuple(int(row_V.argmax()) for row_V in logits), torch.stack(logits).float().cpu())

    def token() -> int:
        return engine.first_token(cache, held, ids)

    return InjectionMethod(lambda: _sample(engine.device, prompt, token), trace, backend, DIRECT)


def _by(recipe: baselines.Recipe, backend: HFBackend, prompt: TokenizedPrompt) -> InjectionMethod:
    def first_token() -> Sample:
        sample = recipe.first_token(backend, prompt)
        return dataclasses.replace(sample, engine_s=sample.user_s)

    return InjectionMethod(first_token, lambda steps: recipe.trace(backend, prompt, steps), backend, DIRECT_EAGER)


def _eager(backend: HFBackend, whole: TokenizedPrompt) -> InjectionMethod:
    def trace(steps: int) -> Trace:
        return ttft.trace(backend, whole, None, steps)

    return InjectionMethod(
        lambda: _sample(backend.device, whole, lambda: backend.first_token(whole).id), trace, backend, DIRECT_EAGER
    )


def _sample(device: torch.device, prompt: TokenizedPrompt, run: Callable[[], int]) -> Sample:
    held = len(prompt.memory_ids)
    synchronize(device)
    started = time.perf_counter()
    token = run()
    seconds = time.perf_counter() - started
    return Sample(seconds, seconds, 0.0, FirstToken(token, held), prompt, held)
