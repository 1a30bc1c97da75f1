"""Serving in an open loop: requests arrive while others run, as at a server, whatever the engine is doing then.

It runs in this process, so that its times contain the engine only, and no HTTP.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from kvmem.engines.base import Injectable
from kvmem.engines.vllm.engine_loop import answer_of
from kvmem.engines.vllm.file_injection import FileInjectingEngine
from kvmem.engines.vllm.requests import EngineRequest, GenerationRequest, VLLMGeneration
from kvmem.errors import KVMemError
from kvmem.prompt import TokenizedPrompt

if TYPE_CHECKING:
    from vllm import RequestOutput


class EngineSteps(Protocol):
    """What an open loop needs of an engine: requests are added, and steps run all of them."""

    @property
    def lock(self) -> AbstractContextManager[object]: ...

    def add(self, request: EngineRequest, stream: bool = False) -> None: ...

    def step(self) -> list[RequestOutput]: ...

    def abort(self, request_ids: Collection[str]) -> None: ...


@dataclass(frozen=True)
class Arrival:
    """A request that arrives `at_s` seconds after the start."""

    at_s: float
    prompt: TokenizedPrompt
    kv_cache: Injectable | None = None
    new_tokens: int = 1
    cache_salt: str | None = None
    orders: Mapping[str, Any] = field(default_factory=dict)
    """What the request tells kvmem's connector beside the memory that it names."""


@dataclass(frozen=True)
class Limit:
    """When a load is given up: its p99 can't be within a goal any more."""

    first_token_s: float
    most_late: float
    """It ends as soon as more requests than this have waited longer for their first token."""
    counted: Collection[int]
    """The numbers of the arrivals that count."""


@dataclass(frozen=True)
class Served:
    """The outcome of an arrival. Its times run from its arrival, in seconds, so they contain its time in the queue."""

    first_token_s: float
    finished_s: float
    answer: VLLMGeneration | KVMemError | None
    """None: the load was given up before. The times then tell how long it had waited."""


class OpenLoop:
    """Serves arrivals on an engine in this process."""

    def __init__(self, engine: FileInjectingEngine, loop: EngineSteps) -> None:
        self.engine = engine
        self.loop = loop

    def serve(self, arrivals: Sequence[Arrival], limit: Limit | None = None) -> list[Served]:
        """Adds each request to the engine at its time of arrival, and runs all of them to their end.

        Answers are greedy, continue past end tokens, and carry the engine's own counts.
        Returns the outcome of each arrival, in the given order. If `limit` ends the load, those that had not arrived
        are left out: arrivals are then in order of time.
        """
        waiting = deque(sorted(enumerate(arrivals), key=lambda numbered: numbered[1].at_s))
        requests = [
            GenerationRequest(
                arrival.prompt, arrival.kv_cache, arrival.new_tokens, cache_salt=arrival.cache_salt, past_end=True
            )
            for arrival in arrivals
        ]
        running: dict[str, int] = {}
        token_ids: dict[int, list[int]] = {}
        first_token_s: dict[int, float] = {}
        served: dict[int, Served] = {}
        with self.loop.lock:
            started = time.perf_counter()
            while waiting or running:
                now = time.perf_counter() - started
                while waiting and waiting[0][1].at_s <= now:
                    number, arrival = waiting.popleft()
                    request = self.engine.engine_request(arrival.prompt, requests[number])
                    request = replace(request, transfer={**request.transfer, **arrival.orders})
                    self.loop.add(request, stream=True)
                    running[request.id] = number
                if not running:
                    time.sleep(max(waiting[0][1].at_s - now, 0.0))
                    continue
                for output in self.loop.step():
                    number = running[output.request_id]
                    since_arrival_s = time.perf_counter() - started - arrivals[number].at_s
                    first_token_s.setdefault(number, since_arrival_s)
                    token_ids.setdefault(number, []).extend(output.outputs[0].token_ids)
                    if output.finished:
                        del running[output.request_id]
                        answer = answer_of(output, token_ids[number])
                        result = self.engine.result(answer, arrivals[number].prompt, requests[number])
                        served[number] = Served(first_token_s[number], since_arrival_s, result)
                if limit is None:
                    continue
                now = time.perf_counter() - started
                waits_s = {number: now - arrivals[number].at_s for number in running.values()}
                first_s = waits_s | first_token_s
                late = sum(first_s.get(number, 0.0) > limit.first_token_s for number in limit.counted)
                if late > limit.most_late:
                    self.loop.abort(list(running))
                    for number, wait_s in waits_s.items():
                        served[number] = Served(first_s[number], wait_s, None)
                    break
        return [served[number] for number in sorted(served)]
