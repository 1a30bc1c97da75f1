"""Requests at a vLLM engine in an open loop, with a second clock, and each answer beside the engine's cold prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from experiments.bench.bench import Bench
from experiments.bench.comparison import FARTHEST
from experiments.measurement import ttft, vllm_generate, vllm_step_clock
from kvmem.engines import FirstToken, Injectable
from kvmem.engines.vllm import Arrival, OpenLoop, VLLMBackend
from kvmem.errors import KVMemError
from kvmem.prompt import TokenizedPrompt


@dataclass(frozen=True, kw_only=True)
class ServedRequest:
    """One request of a load: what it was, what the engine counted, and when by two clocks."""

    memory: int
    digest: str
    """Of the token ids of the prompt."""
    at_s: float
    """Its planned arrival after the first one's plan began."""
    first_token_s: float
    """From its planned arrival, by the loop under test."""
    finished_s: float
    added_s: float | None
    """When it was added to the engine, by the second clock."""
    seen_s: float | None
    """When its first token came out of the engine, by the second clock."""
    prompt_tokens: int
    memory_tokens: int
    """Tokens of the memory that a full hit would cover."""
    local_tokens: int = 0
    injected_tokens: int = 0
    limit_s: float
    """The least seconds of the tokens that were computed."""
    margin: float = 0.0
    """By how much the engine's cold prefill prefers another token where the answer first differs; 0: nowhere."""
    error: str = ""

    @property
    def cached_tokens(self) -> int:
        return self.local_tokens + self.injected_tokens


@dataclass(frozen=True, kw_only=True)
class Load:
    """All requests of one arm at one rate."""

    requests: list[ServedRequest]
    outer_s: float
    """The clock around the whole load."""
    idle_s: float
    """Time in which requests were running and the engine did nothing."""


def serve(bench: Bench, arrivals: Sequence[Arrival], memories: Sequence[int], memory_tokens: Sequence[int]) -> Load:
    """Serves `arrivals`, whose times are ascending, and compares each answer with a cold prefill afterwards.

    memories, memory_tokens: of each request, the number of its memory and the tokens that a full hit would cover.
    """
    engine = bench.backend
    assert isinstance(engine, VLLMBackend)
    clock = vllm_step_clock.StepClock(engine.loop)
    served = OpenLoop(engine, clock).serve(arrivals)
    outer_s = clock.now_s
    engine.reset()
    cold = vllm_generate.cold_answers(engine.llm, [one.prompt.ids for one in arrivals], arrivals[0].new_tokens)
    ids = list(clock.added_s)  # in the order of the arrivals
    requests = []
    for number, (arrival, one, answer, memory, tokens) in enumerate(
        zip(arrivals, served, cold, memories, memory_tokens, strict=True)
    ):
        own_id = ids[number] if number < len(ids) else ""
        error = str(one.answer) if isinstance(one.answer, KVMemError) else ""
        local, injected, margin = 0, 0, 0.0
        if not isinstance(one.answer, KVMemError):
            local, injected = one.answer.local_tokens, one.answer.injected_tokens
            margin = min(answer.margin(one.answer.token_ids), FARTHEST)
        whole = len(arrival.prompt.ids)
        requests.append(
            ServedRequest(
                memory=memory,
                digest=arrival.prompt.digest,
                at_s=arrival.at_s,
                first_token_s=one.first_token_s,
                finished_s=one.finished_s,
                added_s=clock.added_s.get(own_id),
                seen_s=clock.first_token_s.get(own_id),
                prompt_tokens=whole,
                memory_tokens=tokens,
                local_tokens=local,
                injected_tokens=injected,
                limit_s=_limit_s(bench, whole, local + injected),
                margin=margin,
                error=error,
            )
        )
    if any(not one.error and one.first_token_s < one.limit_s for one in requests):
        bench.recalibrate()  # the machine may have been busy when the rates were measured
        requests = [replace(one, limit_s=_limit_s(bench, one.prompt_tokens, one.cached_tokens)) for one in requests]
    return Load(requests=requests, outer_s=outer_s, idle_s=clock.idle_s)


def _limit_s(bench: Bench, prompt_tokens: int, cached_tokens: int) -> float:
    return bench.limit_s(prompt_tokens - cached_tokens, cached_tokens)


def alone_sample(
    bench: Bench,
    sent: TokenizedPrompt,
    prompt: TokenizedPrompt,
    view: Injectable | None,
    cache_s: float,
    split_s: float,
    held: int,
) -> ttft.Sample:
    """One sample of a request that an idle engine serves in the open loop.

    sent: what the engine gets. prompt: the same prompt, split after the memory. held: tokens that a hit spares.
    """
    engine = bench.backend
    assert isinstance(engine, VLLMBackend)
    (one,) = engine.serving.serve([Arrival(0.0, sent, view, 1)])
    if isinstance(one.answer, KVMemError):
        raise one.answer
    token = FirstToken(one.answer.token_ids[0], one.answer.cached_tokens, one.answer.local_tokens)
    user_s = cache_s + split_s + one.first_token_s
    return ttft.Sample(one.first_token_s, user_s, cache_s, token, prompt, held, split_s=split_s)
