"""Requests that arrive while others run, as at a server; in this process, so that nothing but the engine is timed."""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmem.engines.base import FileHandle
from kvmem.engines.vllm import launch
from kvmem.engines.vllm.config import VLLMGeneration
from kvmem.engines.vllm.launch import Request
from kvmem.errors import KVMemError
from kvmem.prompt import TokenizedPrompt

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput


@dataclass(frozen=True)
class Arrival:
    """A request that comes `at_s` seconds after the first moment, whatever the engine is doing then."""

    at_s: float
    prompt: TokenizedPrompt
    kv_cache: FileHandle | None = None
    new_tokens: int = 1
    cache_salt: str | None = None


@dataclass(frozen=True)
class Served:
    """What became of an arrival. Seconds run from its arrival, so a queue counts."""

    first_token_s: float
    finished_s: float
    answer: VLLMGeneration | KVMemError


class ServingEngine:
    """The part of VLLMBackend that serves a stream of arrivals."""

    llm: LLM
    lock: threading.RLock

    @abstractmethod
    def _arrived(self, request_id: str, arrival: Arrival) -> Request: ...

    @abstractmethod
    def _answer(
        self, output: RequestOutput, prompt: TokenizedPrompt, cache_view: FileHandle | None
    ) -> VLLMGeneration | KVMemError: ...

    def serve(self, arrivals: Sequence[Arrival]) -> list[Served]:
        """Serves an open loop: each request is handed to the engine when its time comes, and all run to their end.

        Greedy, past end tokens. What came of each, in the given order; the engine's own counts are in its answer.
        """
        waiting = deque(sorted(enumerate(arrivals), key=lambda numbered: numbered[1].at_s))
        running: dict[str, int] = {}
        first_s: dict[int, float] = {}
        served: dict[int, Served] = {}
        engine = self.llm.llm_engine
        with self.lock:
            started = time.perf_counter()
            while waiting or running:
                now = time.perf_counter() - started
                while waiting and waiting[0][1].at_s <= now:
                    number, arrival = waiting.popleft()
                    launch.add(self.llm, self._arrived(str(number), arrival))
                    running[str(number)] = number
                if not running:
                    time.sleep(max(waiting[0][1].at_s - now, 0.0))
                    continue
                for output in engine.step():
                    number = running[output.request_id]
                    since_s = time.perf_counter() - started - arrivals[number].at_s
                    first_s.setdefault(number, since_s)
                    if output.finished:
                        del running[output.request_id]
                        arrival = arrivals[number]
                        answer = self._answer(output, arrival.prompt, arrival.kv_cache)
                        served[number] = Served(first_s[number], since_s, answer)
        return [served[number] for number in range(len(arrivals))]
