"""Measures TTFT: three clocks, and interleaved rounds in random order."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from experiments.measurement.consensus import from_rank0
from experiments.measurement.equality import Trace
from experiments.measurement.reference import ReferenceForward
from experiments.measurement.statistics import NOISY_SPREAD, spread
from experiments.measurement.witness import Witness
from kvmem.cache import MemoryTokens
from kvmem.engines import FirstToken, Injectable, MeasuredBackend
from kvmem.memory import KVCacheMemory
from kvmem.prompt import Query, TokenizedPrompt


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
    started_s: float = 0.0
    """The start of the call, in seconds since the first call of `interleaved`."""
    outer_s: float = 0.0
    """The time of the whole call by the clock of `interleaved`. It shows what `user_s` leaves out."""
    computed_tokens: int | None = None
    """The number of tokens that entered the model, counted by a witness outside the engine; None without a witness."""
    split_s: float | None = None
    """The part of `user_s` that makes token ids of the text; None where it is not timed apart."""
    ordinal: int | None = None
    """The number of this call among all calls of its arm, from 1. It shows whether calls were left out."""


def nothing() -> None:
    """The preparation of an arm that needs none."""


@dataclass
class Arm:
    """A method that gives a first token. `run` is timed; `prepare`, which is called before it, is not.

    An arm counts its own calls, so that a row tells all of them, whoever chooses among the samples.
    """

    run: Callable[[str], Sample]
    prepare: Callable[[], None] = nothing
    calls: int = 0

    def __call__(self, query: str) -> Sample:
        self.calls += 1
        return self.run(query)


def injected(memory: KVCacheMemory, backend: MeasuredBackend, ids: Sequence[str], query: Query) -> Sample:
    """One sample of the injected arm. Only the tokens that the memory's cache does not cover are prefilled."""
    started = time.perf_counter()
    cache = memory.get_cache(ids)
    synchronize(backend.device)
    fetched = time.perf_counter()
    prompt = backend.split(query, cache)
    ready = time.perf_counter()
    token = backend.first_token(prompt, cache)
    done = time.perf_counter()
    held = backend.held_tokens(prompt, cache)
    return Sample(done - ready, done - started, fetched - started, token, prompt, held, split_s=ready - fetched)


def direct(backend: MeasuredBackend, tokens: MemoryTokens, query: Query) -> Sample:
    """One sample of the direct arm. The memory is prompt text, and the whole prompt is prefilled."""
    started = time.perf_counter()
    prompt = direct_prompt(backend, tokens, query)
    synchronize(backend.device)
    ready = time.perf_counter()
    token = backend.first_token(prompt)
    done = time.perf_counter()
    return Sample(done - ready, done - started, 0.0, token, prompt, split_s=ready - started)


def native_hit(
    backend: MeasuredBackend,
    tokens: MemoryTokens,
    query: Query,
    first_token: Callable[[TokenizedPrompt], FirstToken] | None = None,
) -> Sample:
    """One sample of a prefix hit: the whole prompt, with the memory's full blocks in the engine's prefix cache.

    `fill_prefix_cache` prepares it. first_token: another entry point of the same engine; None is the backend's own.
    """
    started = time.perf_counter()
    prompt = backend.template.split(tokens, query)
    ready = time.perf_counter()
    token = (first_token or backend.first_token)(TokenizedPrompt((), prompt.ids))
    done = time.perf_counter()
    held = whole_blocks(backend, len(prompt.memory_ids))
    return Sample(done - ready, done - started, 0.0, token, prompt, held, split_s=ready - started)


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


def query_alone_sample(backend: MeasuredBackend, split: Callable[[Query], TokenizedPrompt], query: Query) -> Sample:
    """One sample of the engine's prefill of the query's tokens alone, from token ids: the floor of every injection."""
    prompt = TokenizedPrompt((), split(query).query_ids)
    started = time.perf_counter()
    token = backend.first_token(prompt)
    seconds = time.perf_counter() - started
    return Sample(seconds, seconds, 0.0, token, prompt)


def reference_sample(reference: ReferenceForward, split: Callable[[Query], TokenizedPrompt], query: Query) -> Sample:
    """One sample of the independent forward pass on the whole prompt, from token ids: the direct arm's baseline."""
    prompt = TokenizedPrompt((), split(query).ids)
    started = time.perf_counter()
    token = reference.first_token(prompt.ids)
    seconds = time.perf_counter() - started
    return Sample(seconds, seconds, 0.0, FirstToken(token, 0), prompt)


def interleaved(
    arms: dict[str, Arm],
    queries: Sequence[str],
    rng: random.Random,
    warmups: int = 1,
    witness: Witness | None = None,
) -> dict[str, list[Sample]]:
    """Samples each arm once a round, in random order, a round for each of `queries`.

    `warmups` rounds with the first query come before, and are not counted. The garbage collector is off meanwhile, as
    in timeit: its pauses would hit either arm by chance.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in arms}
    gc.collect()
    gc.disable()
    origin = time.perf_counter()
    try:
        for round_, query in enumerate([*[queries[0]] * warmups, *queries]):
            for name in rng.sample(sorted(arms), len(arms)):
                sample = timed_call(arms[name], query, origin, witness)
                if round_ >= warmups:
                    samples[name].append(sample)
    finally:
        gc.enable()
    return samples


def timed_call(arm: Arm, query: str, origin: float, witness: Witness | None) -> Sample:
    """One call of an arm, with the clock around it and what a witness saw. `origin`: of the clock that it starts by."""
    arm.prepare()
    counted = witness.count if witness else 0
    started = time.perf_counter()
    sample = arm(query)
    outer_s = time.perf_counter() - started
    return replace(
        sample,
        token=_kept(sample.token),
        started_s=started - origin,
        outer_s=outer_s,
        computed_tokens=witness.count - counted if witness else None,
        ordinal=arm.calls,
    )


def _kept(token: FirstToken) -> FirstToken:
    """The token with a copy of its logits, which the engine's next call may overwrite."""
    return token if token.logits_V is None else replace(token, logits_V=token.logits_V.detach().clone())


def interleaved_calm(
    arms: dict[str, Arm],
    queries: Sequence[str],
    rng: random.Random,
    warmups: int = 1,
    witness: Witness | None = None,
) -> tuple[dict[str, list[Sample]], int]:
    """Runs `interleaved`, and once more if an arm is noisy. Returns the last run's samples, and the number of runs.

    The rule is fixed beforehand: the second run counts, be it calmer or not, so that no run is chosen by its result.
    """
    first = interleaved(arms, queries, rng, warmups, witness)
    if from_rank0(worst_spread(first)) <= NOISY_SPREAD:
        return first, 1
    return interleaved(arms, queries, rng, 0, witness), 2


def worst_spread(samples: dict[str, list[Sample]]) -> float:
    """The largest `spread` among the arms."""
    return max(spread([sample.engine_s for sample in of_arm]) for of_arm in samples.values())


def worst_hit(samples: Sequence[Sample]) -> Sample:
    """The sample whose cache hit differs most from the expected one. A median would hide a single miss."""
    return max(samples, key=lambda sample: abs(sample.token.cached_tokens - sample.expected_tokens))


def trace(
    backend: MeasuredBackend, prompt: TokenizedPrompt, view: Callable[[], Injectable] | None, steps: int
) -> Trace:
    """A greedy answer of `steps` tokens, with logits of shape (steps, vocab). An end token does not stop it."""
    backend.reset()
    answer = backend.greedy(prompt, view() if view else None, steps)
    return Trace(answer.token_ids, answer.logits_SV, answer.complete)


def native_trace(backend: MeasuredBackend, prompt: TokenizedPrompt, steps: int) -> Trace:
    """The answer behind blocks that the engine's own prefill of the memory left in its prefix cache."""
    fill_prefix_cache(backend, prompt.memory_ids)
    answer = backend.greedy(TokenizedPrompt((), prompt.ids), None, steps)
    return Trace(answer.token_ids, answer.logits_SV, answer.complete)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
