"""A second clock around an engine that serves requests in an open loop, which the loop itself does not read."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from kvmem.engines.vllm import EngineRequest, EngineSteps

if TYPE_CHECKING:
    from vllm import RequestOutput


class StepClock:
    """Stands between an open loop and its engine, and notes when each request is added and gets its first token.

    All times are in seconds since this clock began.
    """

    def __init__(self, steps: EngineSteps) -> None:
        self._steps = steps
        self._running: set[str] = set()
        self._began = self._left = time.perf_counter()
        self.added_s: dict[str, float] = {}
        """By request, in the order in which they were added."""
        self.first_token_s: dict[str, float] = {}
        self.idle_s = 0.0
        """Time outside of the engine while requests were running: it did nothing for them."""

    @property
    def lock(self) -> AbstractContextManager[object]:
        return self._steps.lock

    @property
    def now_s(self) -> float:
        return time.perf_counter() - self._began

    def add(self, request: EngineRequest, stream: bool = False) -> None:
        self._enter()
        self._steps.add(request, stream)
        self.added_s[request.id] = self.now_s
        self._running.add(request.id)
        self._left = time.perf_counter()

    def step(self) -> list[RequestOutput]:
        self._enter()
        outputs = self._steps.step()
        for output in outputs:
            self.first_token_s.setdefault(output.request_id, self.now_s)
            if output.finished:
                self._running.discard(output.request_id)
        self._left = time.perf_counter()
        return outputs

    def abort(self, request_ids: Collection[str]) -> None:
        self._steps.abort(request_ids)
        self._running.difference_update(request_ids)

    def _enter(self) -> None:
        if self._running:
            self.idle_s += time.perf_counter() - self._left
