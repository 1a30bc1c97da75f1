"""Measures TTFT: two clocks, interleaved pairs in random order, medians and bootstrap intervals."""

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
"""The largest interquartile range of an arm, as a share of its median. A noisier measurement is repeated."""
RESAMPLES = 2000
ENOUGH_FOR_INTERVAL = 3
"""The smallest number of pairs with an interval."""
Interval = tuple[float, float]


@dataclass(frozen=True)
class Sample:
    """One measurement of a first token."""

    engine_s: float
    """Seconds from the token ids to the first token id on the host."""
    user_s: float
    """Seconds from the text to the first token id on the host."""
    cache_s: float
    """The part of `user_s` that fetches or merges the cache."""
    token: FirstToken
    prompt: TokenizedPrompt
    expected_tokens: int = 0
    """The number of prompt tokens that the cache should cover. `token.cached_tokens` is the number that it covered."""


Arm = Callable[[], Sample]


def injected(memory: KVCacheMemory, backend: MeasuredBackend, ids: Sequence[str], query: Query) -> Sample:
    """One sample of the injected arm. Only the tokens that the memory's cache does not cover are prefilled."""
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
    """One sample of the direct arm. The memory is prompt text, and the whole prompt is prefilled."""
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
    """One sample of a prefix hit: the whole prompt, with the memory's full blocks in the engine's prefix cache.

    view: the memory to fill the prefix cache from (see `fill_prefix_cache`).
    first_token: another entry point of the same engine; None for the backend's own.
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
    """Empties the engine's prefix cache, and fills it with the blocks of `token_ids`.

    The blocks come from a prefill, or from the memory `view`, which takes a tenth of the time.
    """
    backend.reset()
    ids = tuple(token_ids)
    if view is None:
        backend.first_token(TokenizedPrompt((), ids))
    else:
        backend.first_token(TokenizedPrompt(ids[:-1], ids[-1:]), view())


def whole_blocks(backend: MeasuredBackend, tokens: int) -> int:
    """How many of the first `tokens` tokens are in full blocks of the engine's prefix cache."""
    block = backend.prefix_block_tokens
    return tokens // block * block if block else 0


def direct_prompt(backend: MeasuredBackend, tokens: MemoryTokens, query: Query) -> TokenizedPrompt:
    """The whole prompt with nothing cached. It is tokenised from the text, not from the ids of the cache."""
    return backend.template.split(tokens.model_copy(update={"token_ids": ()}), query)


def interleaved(arms: dict[str, Arm], pairs: int, rng: random.Random, warmups: int = 1) -> dict[str, list[Sample]]:
    """Samples each arm once a round, in random order. `warmups` rounds, which do not count, precede `pairs` rounds.

    Python's garbage collector is disabled meanwhile, as in timeit, because its pauses would affect the arms at random.
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


def interleaved_with_retry(
    arms: dict[str, Arm], pairs: int, rng: random.Random, warmups: int = 1
) -> tuple[dict[str, list[Sample]], int]:
    """Runs `interleaved`, and once more if an arm is noisy. Returns the less noisy samples, and the number of runs."""
    first = interleaved(arms, pairs, rng, warmups)
    if from_rank0(worst_spread(first)) <= NOISY_SPREAD:
        return first, 1
    second = interleaved(arms, pairs, rng, warmups=0)
    return min(first, second, key=worst_spread), 2


def worst_spread(samples: dict[str, list[Sample]]) -> float:
    """The largest `spread` among the arms."""
    return max(spread([sample.engine_s for sample in of_arm]) for of_arm in samples.values())


def spread(seconds: Sequence[float]) -> float:
    """The interquartile range divided by the median."""
    low, median, high = np.percentile(seconds, [25, 50, 75])
    return float((high - low) / median)


def worst_hit(samples: Sequence[Sample]) -> Sample:
    """The sample whose cache hit differs most from the expected one. A median would hide a single miss."""
    return max(samples, key=lambda sample: abs(sample.token.cached_tokens - sample.expected_tokens))


def speedup_pct(kv_s: Sequence[float], direct_s: Sequence[float]) -> float:
    """100 × (1 − median injected / median direct)."""
    return 100 * (1 - statistics.median(kv_s) / statistics.median(direct_s))


def paired_ratio(a_s: Sequence[float], b_s: Sequence[float], seed: int = 0) -> tuple[float, Interval | None]:
    """The median of a / b over the pairs, and its 95% interval. Drift that affects both arms cancels."""
    ratios = np.asarray(a_s) / np.asarray(b_s)
    return float(np.median(ratios)), median_interval(ratios.tolist(), seed)


def median_interval(values: Sequence[float], seed: int = 0) -> Interval | None:
    """The 95% percentile bootstrap interval of the median; None for fewer than 3 values."""
    return _interval((np.asarray(values),), np.median, seed)


def speedup_interval(kv_s: Sequence[float], direct_s: Sequence[float], seed: int = 0) -> Interval | None:
    """The 95% percentile bootstrap interval of `speedup_pct` over the pairs; None for fewer than 3 pairs.

    Efron & Tibshirani, "An introduction to the bootstrap", 1993, chapter 13.
    """

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
    """A greedy answer of `steps` tokens, with logits of shape (steps, vocab). An end token does not stop it."""
    backend.reset()
    answer = backend.greedy(prompt, view() if view else None, steps)
    return Trace(answer.token_ids, answer.logits_SV, answer.complete)


def rounding_noise(backend: MeasuredBackend, token_ids: Sequence[int], memory_tokens: int) -> float:
    """The rounding noise of the direct arm's last logits: the largest absolute difference between chunkings.

    The prompt is prefilled in one chunk, in two halves, and in two chunks that meet where the memory ends. Kernels
    choose tiles and splits by the number of new tokens, so a single chunking can be bitwise equal by chance. The
    injected arm is not used.
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
