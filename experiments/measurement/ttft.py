"""How a TTFT is taken: two clocks, interleaved pairs in random order, medians and a bootstrap interval."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats

from experiments.measurement.consensus import from_rank0
from experiments.measurement.engine_adapters import two_chunkings
from experiments.measurement.equality import Trace
from kvmem.cache import MemoryTokens
from kvmem.engines import FirstToken, Injectable, MeasuredBackend
from kvmem.memory import KVCacheMemory
from kvmem.prompt import Query, TokenizedPrompt

NOISY_SPREAD = 0.25
"""A run in which an arm's interquartile range exceeds this share of its median was disturbed, and is repeated."""
RESAMPLES = 2000
ENOUGH_FOR_INTERVAL = 3
"""Fewer pairs than this have a median and no interval."""
Interval = tuple[float, float]


@dataclass(frozen=True)
class Sample:
    """One first token. `user_s` runs from text, `engine_s` from token ids ready, both to the token id on the host.

    `cache_s` is the part of user_s that went into getting the cache: a fetch, or a merge of several memories.
    """

    engine_s: float
    user_s: float
    cache_s: float
    token: FirstToken
    prompt: TokenizedPrompt
    expected_tokens: int = 0
    """How many tokens the cache should have covered; `token.cached_tokens` is how many it did."""


Arm = Callable[[], Sample]


def injected(memory: KVCacheMemory, backend: MeasuredBackend, ids: Sequence[str], query: Query) -> Sample:
    """One sample of the injected arm: prefills only the tokens that the memory's cache does not cover."""
    backend.reset()
    started = time.perf_counter()
    cache = memory.get_cache(ids)
    synchronize(backend.device)
    fetched = time.perf_counter()
    prompt = backend.split(query, cache)
    ready = time.perf_counter()
    token = backend.first_token(prompt, cache)
    done = time.perf_counter()
    return Sample(done - ready, done - started, fetched - started, token, prompt, backend.held_tokens(prompt, cache))


def direct(backend: MeasuredBackend, tokens: MemoryTokens, query: Query) -> Sample:
    """One sample of the direct arm: the memory as prompt text, rendered, tokenised and prefilled whole."""
    backend.reset()
    started = time.perf_counter()
    prompt = direct_prompt(backend, tokens, query)
    synchronize(backend.device)
    ready = time.perf_counter()
    token = backend.first_token(prompt)
    done = time.perf_counter()
    return Sample(done - ready, done - started, 0.0, token, prompt)


def native_hit(
    backend: MeasuredBackend,
    tokens: MemoryTokens,
    query: Query,
    view: Callable[[], Injectable] | None = None,
    first_token: Callable[[TokenizedPrompt], FirstToken] | None = None,
) -> Sample:
    """One sample of a prefix hit: the whole prompt, on an engine whose prefix cache holds the memory's whole blocks.

    view: see `fill_prefix_cache`. first_token: another entry point of the same engine; None is the backend's own.
    """
    fill_prefix_cache(backend, tokens.token_ids, view)
    started = time.perf_counter()
    prompt = backend.template.split(tokens, query)
    ready = time.perf_counter()
    token = (first_token or backend.first_token)(TokenizedPrompt((), prompt.ids))
    done = time.perf_counter()
    return Sample(done - ready, done - started, 0.0, token, prompt, whole_blocks(backend, len(prompt.memory_ids)))


def fill_prefix_cache(
    backend: MeasuredBackend, token_ids: Sequence[int], view: Callable[[], Injectable] | None = None
) -> None:
    """Empties the engine's prefix cache and fills it with the blocks of `token_ids`.

    By a prefill; or, if `view` is given, from that memory, which takes a tenth of the time."""
    backend.reset()
    ids = tuple(token_ids)
    if view is None:
        backend.first_token(TokenizedPrompt((), ids))
    else:
        backend.first_token(TokenizedPrompt(ids[:-1], ids[-1:]), view())


def whole_blocks(backend: MeasuredBackend, tokens: int) -> int:
    """The number of the first `tokens` tokens that fill whole blocks of the engine's prefix cache."""
    block = backend.prefix_block_tokens
    return tokens // block * block if block else 0


def direct_prompt(backend: MeasuredBackend, tokens: MemoryTokens, query: Query) -> TokenizedPrompt:
    """The whole prompt with nothing cached, tokenised from the text and not from the cache's ids."""
    return backend.template.split(tokens.model_copy(update={"token_ids": ()}), query)


def interleaved(arms: dict[str, Arm], pairs: int, rng: random.Random, warmups: int = 1) -> dict[str, list[Sample]]:
    """Samples each arm once a round, in random order, for `pairs` rounds after `warmups` rounds that are not counted.

    The garbage collector is off meanwhile, as in timeit: its pauses would hit either arm by chance.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in arms}
    gc.collect()
    gc.disable()
    try:
        for round_ in range(warmups + pairs):
            for name in rng.sample(sorted(arms), len(arms)):
                sample = arms[name]()
                if round_ >= warmups:
                    samples[name].append(sample)
    finally:
        gc.enable()
    return samples


def interleaved_calm(
    arms: dict[str, Arm], pairs: int, rng: random.Random, warmups: int = 1
) -> tuple[dict[str, list[Sample]], int]:
    """`interleaved`, repeated once if an arm was disturbed. Returns the calmer run, whole, and how many ran."""
    first = interleaved(arms, pairs, rng, warmups)
    if from_rank0(worst_spread(first)) <= NOISY_SPREAD:
        return first, 1
    second = interleaved(arms, pairs, rng, warmups=0)
    return min(first, second, key=worst_spread), 2


def worst_spread(samples: dict[str, list[Sample]]) -> float:
    """The largest interquartile range over median among the arms."""
    return max(spread([sample.engine_s for sample in taken]) for taken in samples.values())


def spread(seconds: Sequence[float]) -> float:
    low, median, high = np.percentile(seconds, [25, 50, 75])
    return float((high - low) / median)


def worst_hit(samples: Sequence[Sample]) -> Sample:
    """The sample whose hit is furthest from the expected one: in a median, one miss among many would go unnoticed."""
    return max(samples, key=lambda sample: abs(sample.token.cached_tokens - sample.expected_tokens))


def speedup_pct(kv_s: Sequence[float], direct_s: Sequence[float]) -> float:
    """100 × (1 − median injected / median direct)."""
    return 100 * (1 - statistics.median(kv_s) / statistics.median(direct_s))


def paired_ratio(a_s: Sequence[float], b_s: Sequence[float], seed: int = 0) -> tuple[float, Interval | None]:
    """Median of a / b over the pairs, and its 95% interval: drift that hits both arms cancels."""
    ratios = np.asarray(a_s) / np.asarray(b_s)
    return float(np.median(ratios)), median_interval(ratios.tolist(), seed)


def median_interval(values: Sequence[float], seed: int = 0) -> Interval | None:
    """95% percentile bootstrap interval of the median; None for fewer than 3 values."""
    return _interval((np.asarray(values),), np.median, seed)


def speedup_interval(kv_s: Sequence[float], direct_s: Sequence[float], seed: int = 0) -> Interval | None:
    """95% percentile bootstrap over the pairs (Efron & Tibshirani 1993, chapter 13); None for fewer than 3 pairs."""

    def speedup(kv: np.ndarray, direct: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray(100 * (1 - np.median(kv, axis=axis) / np.median(direct, axis=axis)))

    return _interval((np.asarray(kv_s), np.asarray(direct_s)), speedup, seed)


def _interval(samples: tuple[np.ndarray, ...], statistic: Callable[..., Any], seed: int) -> Interval | None:
    if len(samples[0]) < ENOUGH_FOR_INTERVAL:
        return None
    found = stats.bootstrap(
        samples,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def trace(
    backend: MeasuredBackend, prompt: TokenizedPrompt, view: Callable[[], Injectable] | None, steps: int
) -> Trace:
    """`steps` greedy tokens and the logits (steps, vocab) that gave each; an end token does not stop it."""
    backend.reset()
    answer = backend.greedy(prompt, view() if view else None, steps)
    return Trace(answer.token_ids, answer.logits_SV, answer.complete)


def rounding_noise(backend: MeasuredBackend, token_ids: Sequence[int], memory_tokens: int) -> float:
    """How far rounding alone moves the direct arm's last logits: the largest absolute difference between chunkings.

    The prompt is prefilled whole, cut in half, and cut where the memory ends. Kernels choose tiles and splits by the
    number of new tokens, so that one cut alone can be bitwise equal by chance. The injected arm has no part in it.
    """
    noise = 0.0
    for at in {len(token_ids) // 2, memory_tokens} - {0, len(token_ids)}:
        whole_V, parts_V = two_chunkings(backend, token_ids, at)
        finite_V = whole_V.isfinite() & parts_V.isfinite()
        noise = max(noise, float((whole_V[finite_V] - parts_V[finite_V]).abs().max()))
    return noise


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
