"""Serving in an open loop: requests arrive while others run, as at a server, whatever the engine is doing then.

It runs in this process, so that its times contain the engine only, and no HTTP.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

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


@dataclass(frozen=True)
class Arrival:
    """A request that arrives `at_s` seconds after the start."""

    at_s: float
    prompt: TokenizedPrompt
    kv_cache: Injectable | None = None
    new_tokens: int = 1
    cache_salt: str | None = None


@dataclass(frozen=True)
class Served:
    """The outcome of an arrival. Its times run from its arrival, in seconds, so they contain its time in the queue."""

    first_token_s: float
    finished_s: float
    answer: VLLMGeneration | KVMemError


class OpenLoop:
    """Serves arrivals on an engine in this process."""

    def __init__(self, engine: FileInjectingEngine, loop: EngineSteps) -> None:
        self.engine = engine
        self.loop = loop

    def serve(self, arrivals: Sequence[Arrival]) -> list[Served]:
        """Adds each request to the engine at its time of arrival, and runs all of them to their end.

        Answers are greedy, continue past end tokens, and carry the engine's own counts.
        Returns the outcome of each arrival, in the given order.
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
        return [served[number] for number in range(len(arrivals))]
