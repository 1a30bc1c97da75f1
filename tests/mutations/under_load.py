"""A vLLM engine under load whose answers are remembered, whose clock is wrong, or whose other arms are held back."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from experiments.load_arms.injected import Injected
from experiments.load_arms.injected_cold import InjectedCold
from experiments.scenarios import under_load
from kvmem.engines.vllm import OpenLoop, Served, VLLMGeneration, open_loop
from kvmem.memory import KVCacheMemory
from tests.mutations import baseline
from tests.mutations.mutation import Mutation, Patch

KIND = "under_load"
SMALL = (
    "backend=vllm",
    "backend.dtype=float32",
    "backend.max_model_len=1024",
    "scenario=under_load",
    "scenario.memories=2",
    "scenario.memory_tokens=136",
    "scenario.requests=8",
    "scenario.loads=[1.0]",
    "scenario.search=false",
    "scenario.arms=[text,prefix_cache,injected]",
    "scenario.new_tokens=2",
)
COLD = "scenario.arms=[text,injected_cold]"
SEARCH = (
    "scenario.search=true",
    "scenario.arms=[text,injected]",
    "scenario.goal_ttft_s=1.0",
    "scenario.search_step=1.1",
)


def _serving(change: Callable[[Any, Any, Any], Any]) -> Patch:
    """Replaces the open loop's `serve` by `change(original, loop, arrivals)`."""
    return Patch(
        OpenLoop, "serve", lambda original: lambda loop, arrivals, limit=None: change(original, loop, arrivals)
    )


def _nothing(serve: Any, loop: Any, arrivals: Any) -> list[Served]:
    """Requests with a memory are answered without the engine."""
    real = iter(serve(loop, [one for one in arrivals if one.kv_cache is None]))
    found = []
    for one in arrivals:
        held = len(one.prompt.memory_ids)
        answer = VLLMGeneration("", (0,) * one.new_tokens, len(one.prompt.ids), held, "length", injected_tokens=held)
        found.append(next(real) if one.kv_cache is None else Served(1e-4, 2e-4, answer))
    return found


def _remembered() -> Callable[[Any, Any, Any], Any]:
    known: dict[Any, Any] = {}

    def change(serve: Any, loop: Any, arrivals: Any) -> list[Served]:
        """The engine computes, and the memory's first answer is returned."""
        found = []
        for one, arrival in zip(serve(loop, arrivals), arrivals, strict=True):
            if arrival.kv_cache is not None:
                ids = known.setdefault(arrival.prompt.memory_ids, one.answer.token_ids)
                one = replace(one, answer=replace(one.answer, token_ids=ids))
            found.append(one)
        return found

    return change


def _late(share: float, seconds: float, least: int) -> Callable[[Any, Any, Any], Any]:
    """The clock of a request with a memory leaves out time, in loads of at least `least` requests."""

    def change(serve: Any, loop: Any, arrivals: Any) -> list[Served]:
        found = serve(loop, arrivals)
        if len(arrivals) < least:
            return found  # type: ignore[no-any-return]
        return [
            one if arrival.kv_cache is None else replace(one, first_token_s=share * one.first_token_s - seconds)
            for one, arrival in zip(found, arrivals, strict=True)
        ]

    return change


def _salted(least: int) -> Callable[[Any, Any, Any], Any]:
    """Requests without a memory can't use the blocks of another, in loads of at least `least` requests."""

    def change(serve: Any, loop: Any, arrivals: Any) -> Any:
        if len(arrivals) >= least:
            arrivals = [
                one if one.kv_cache is not None else replace(one, cache_salt=uuid.uuid4().hex) for one in arrivals
            ]
        return serve(loop, arrivals)

    return change


def _held_back(serve: Any, loop: Any, arrivals: Any) -> list[Served]:
    """A request without a memory takes three times as long on an idle engine."""
    started = time.perf_counter()
    found = serve(loop, arrivals)
    if len(arrivals) > 1 or arrivals[0].kv_cache is not None:
        return found  # type: ignore[no-any-return]
    time.sleep(2 * (time.perf_counter() - started))
    return [replace(one, first_token_s=3 * one.first_token_s, finished_s=3 * one.finished_s) for one in found]


def _hit_slower(serve: Any, loop: Any, arrivals: Any) -> list[Served]:
    """A hit in the prefix cache takes three times as long on an idle engine."""
    started = time.perf_counter()
    found = serve(loop, arrivals)
    if len(arrivals) > 1 or not getattr(found[0].answer, "local_tokens", 0):
        return found  # type: ignore[no-any-return]
    time.sleep(2 * (time.perf_counter() - started))
    return [replace(one, first_token_s=3 * one.first_token_s, finished_s=3 * one.finished_s) for one in found]


def _pauses(original: Any) -> Any:
    def answer_of(*given: Any) -> Any:
        time.sleep(0.05)
        return original(*given)

    return answer_of


def _another_memory(original: Any) -> Any:
    first: list[Any] = []

    def get_cache(memory: Any, ids: Any) -> Any:
        handle = original(memory, ids)
        first.append(handle)
        return replace(handle, file=first[0].file)

    return get_cache


def _slower_arrivals(original: Any) -> Any:
    def serve(bench: Any, engine: Any, arrivals: Any, *given: Any) -> Any:
        slower = [one if one.kv_cache is None else replace(one, at_s=3 * one.at_s) for one in arrivals]
        return original(bench, engine, slower, *given)

    return serve


def _figures(**changed: float) -> Patch:
    def make(original: Any) -> Any:
        return lambda row: original(replace(row, payload=replace(row.payload, **changed)))

    return Patch(under_load, "judged_again", make)


def _cold_is_warm() -> Patch:
    """Files of the cold arm stay in host memory."""
    return Patch(InjectedCold, "prepare", lambda original: Injected.prepare)


def _early_end() -> Patch:
    """The search takes its first rate that passes."""
    return Patch(under_load, "search", lambda original: lambda passes, start, *given: start if passes(start) else None)


def _load(name: str, expected: str, *patches: Patch, arm: str = "injected") -> Mutation:
    return Mutation(KIND, name, expected, patches, SMALL, arm)


MUTATIONS = [
    _load("a loaded arm computes nothing", "never reached the engine|the hardware needs", _serving(_nothing)),
    _load("a loaded arm's answers are remembered", "answers are not those of vLLM", _serving(_remembered())),
    _load(
        "a memory's KV is another's",
        "answers|a logit|the engine reused",
        Patch(KVCacheMemory, "get_cache", _another_memory),
    ),
    _load("the serving clock starts late", "not in its TTFT|exceed|after the time", _serving(_late(0.3, 0.0, 1))),
    _load("the queue is not timed", "after the time that its TTFT says", _serving(_late(1.0, 0.05, 2))),
    _load("the loaded direct arm is 3 times slower", baseline.SLOW, _serving(_held_back)),
    _load("the prefix hit is 3 times slower", "native hit arm is too slow", _serving(_hit_slower), arm="native hit"),
    _load("the prefix hit is held back", "tokens came from the cache", _serving(_salted(1)), arm="native hit"),
    _load("the prefix hit is held back under load", "did not reuse", _serving(_salted(2)), arm="native hit"),
    _load("the engine pauses under load", "in no request|did nothing", Patch(open_loop, "answer_of", _pauses)),
    _load("injected requests arrive slower", "as the seed says", Patch(under_load, "serve", _slower_arrivals)),
    _load("a loaded TTFT is halved", "ttft_p99_s is stored as", _figures(ttft_p99_s=1e-3)),
    Mutation(
        KIND, "cold files are warm", "files were read during", (_cold_is_warm(),), (*SMALL, COLD), "injected cold"
    ),
    Mutation(KIND, "a search ends early", "the search of run 1 ended", (_early_end(),), (*SMALL, *SEARCH), "injected"),
    _load("a sustained rate is too high", "sustained_a_second is stored as", _figures(sustained_a_second=1e3)),
]
