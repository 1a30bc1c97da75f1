"""Requests at a vLLM engine in an open loop, with a second clock, and each answer beside the engine's cold prefill."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from experiments.bench.bench import Bench
from experiments.bench.comparison import FARTHEST
from experiments.measurement import ColdAnswer, ttft, vllm_generate, vllm_step_clock
from kvmem.engines import FirstToken
from kvmem.engines.vllm import Arrival, Limit, OpenLoop, VLLMBackend, VLLMGeneration
from kvmem.errors import KVMemError
from kvmem.prompt import TokenizedPrompt


@dataclass(frozen=True, kw_only=True)
class ServedRequest:
    """One request of a load: what it was, what the engine counted, and when by two clocks."""

    memory: int
    """Its number; -1 for a request that uses none."""
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
    margin: float | None = None
    """By how much the engine's cold prefill prefers another token where the answer first differs; 0: nowhere. None: the
    answer was not compared."""
    error: str = ""
    unfinished: bool = False
    """The load was given up before the answer was complete. Its times then tell how long it had waited."""

    @property
    def is_answered(self) -> bool:
        return not self.error and not self.unfinished

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
    stopped: bool = False
    """Whether it was given up, because its p99 could not be within the goal any more. It holds the requests that had
    arrived."""
    files_read: int | None = None
    """Memory files that the engine read into host memory meanwhile; None for an engine without kvmem."""
    page_cache_pct: float | None = None
    """The share of the memory files in the operating system's page cache when a load of cold files began."""


def serve(
    bench: Bench,
    engine: VLLMBackend,
    arrivals: Sequence[Arrival],
    memories: Sequence[int],
    memory_tokens: Sequence[int],
    limit: Limit | None = None,
    checked: Collection[int] | None = None,
) -> Load:
    """Serves `arrivals`, whose times are ascending, and compares answers with a cold prefill afterwards.

    engine: the bench's own, or another one of the same weights. The cold prefill is the bench's.
    memories, memory_tokens: of each request, the number of its memory and the tokens that a full hit would cover.
    limit: when the load is given up. checked: the numbers of the requests whose answers are compared; None: all.
    """
    judge = bench.backend
    assert isinstance(judge, VLLMBackend)
    clock = vllm_step_clock.StepClock(engine.loop)
    served = OpenLoop(engine, clock).serve(arrivals, limit)
    outer_s = clock.now_s
    compared = [number for number in range(len(served)) if checked is None or number in checked]
    cold = _cold_answers(bench, judge, [arrivals[number] for number in compared])
    answers = dict(zip(compared, cold, strict=True))
    ids = list(clock.added_s)  # in the order of the arrivals
    requests = []
    for number, (arrival, one, memory, tokens) in enumerate(
        zip(arrivals, served, memories, memory_tokens, strict=False)  # a load that was given up served the first ones
    ):
        own_id = ids[number] if number < len(ids) else ""
        error = str(one.answer) if isinstance(one.answer, KVMemError) else ""
        local, injected, margin = 0, 0, None
        if isinstance(one.answer, VLLMGeneration):
            local, injected = one.answer.local_tokens, one.answer.injected_tokens
            if number in answers:
                margin = min(answers[number].margin(one.answer.token_ids), FARTHEST)
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
                unfinished=one.answer is None,
            )
        )
    if any(one.is_answered and one.first_token_s < one.limit_s for one in requests):
        bench.recalibrate()  # the machine may have been busy when the rates were measured
        requests = [replace(one, limit_s=_limit_s(bench, one.prompt_tokens, one.cached_tokens)) for one in requests]
    stopped = any(one.unfinished for one in requests) or len(requests) < len(arrivals)
    return Load(requests=requests, outer_s=outer_s, idle_s=clock.idle_s, stopped=stopped)


def _cold_answers(bench: Bench, judge: VLLMBackend, arrivals: Sequence[Arrival]) -> list[ColdAnswer]:
    """vLLM's own answer to each prompt, computed once in a run: all arms and rates have the same prompts."""
    keys = [f"{one.prompt.digest} {one.new_tokens}" for one in arrivals]
    missing = {key: one for key, one in zip(keys, arrivals, strict=True) if key not in bench.cold_answers}
    if missing:
        judge.reset()
        steps = next(iter(missing.values())).new_tokens
        found = vllm_generate.cold_answers(judge.llm, [one.prompt.ids for one in missing.values()], steps)
        bench.cold_answers.update(zip(missing, found, strict=True))
    return [bench.cold_answers[key] for key in keys]


def _limit_s(bench: Bench, prompt_tokens: int, cached_tokens: int) -> float:
    return bench.limit_s(prompt_tokens - cached_tokens, cached_tokens)


def alone_sample(
    engine: VLLMBackend, sent: Arrival, prompt: TokenizedPrompt, cache_s: float, split_s: float, held: int
) -> ttft.Sample:
    """One sample of a request that an idle engine serves in the open loop.

    sent: what the engine gets. prompt: the same prompt, split after the memory. held: tokens that a hit spares.
    """
    (one,) = engine.serving.serve([sent])
    if isinstance(one.answer, KVMemError):
        raise one.answer
    assert one.answer is not None
    token = FirstToken(one.answer.token_ids[0], one.answer.cached_tokens, one.answer.local_tokens)
    user_s = cache_s + split_s + one.first_token_s
    return ttft.Sample(one.first_token_s, user_s, cache_s, token, prompt, held, split_s=split_s)
