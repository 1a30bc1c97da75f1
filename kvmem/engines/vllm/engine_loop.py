"""Runs requests on a vLLM engine in this process. Imports vLLM only when a request is sent."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Collection, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvmem.engines.vllm import process
from kvmem.engines.vllm.connector import REPORT, UNPIN, Report
from kvmem.engines.vllm.requests import EngineAnswer, EngineRequest
from kvmem.errors import EngineError

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1


PAUSE_S = 0.0005
"""How often a request beside batches looks whether one waits for the engine."""


class TurnLock:
    """A reentrant lock that knows how many threads wait for it."""

    def __init__(self) -> None:
        self._lock, self._counting = threading.RLock(), threading.Lock()
        self.waiting = 0

    def __enter__(self) -> None:
        if self._lock.acquire(blocking=False):
            return
        with self._counting:
            self.waiting += 1
        try:
            self._lock.acquire()
        finally:
            with self._counting:
                self.waiting -= 1

    def __exit__(self, *error: object) -> None:
        self._lock.release()


LONGEST_DRAIN_S = 30.0
"""How long blocks of requests that have ended may still be copied elsewhere, before the prefix cache is emptied."""


class EngineLoop:
    """The step loop of one engine. It runs one batch at a time: whoever uses it holds `lock` until the batch ends.
    A request of `run_behind` runs beside it.

    The engines of a process take turns step by step. An engine is closed when its loop is no longer used.
    """

    def __init__(
        self, llm: LLM, connector: KVConnectorBase_V1 | None, end_tokens: Collection[int], drains: bool = False
    ) -> None:
        """connector: the KV connector that `llm` has in this process; None if its workers are other processes.
        drains: whether it is another one than kvmem's, which may hold blocks of a request that has ended until it has
        copied them in later steps."""
        self.drains = drains
        self.llm = llm
        self.connector = connector
        weakref.finalize(self, process.close, llm, connector).atexit = False  # at exit, vLLM closes its engines
        self.end_tokens = sorted(end_tokens)
        self.lock = TurnLock()
        self.behind: dict[str, RequestOutput | None] = {}
        """Requests that run beside batches, with their outputs once they are finished."""
        self.pins_to_release: list[str] = []
        """Names of pins that the engine is still to release: they are sent with the next request."""

    def run(self, requests: Sequence[EngineRequest], stream: bool = False) -> Generator[RequestOutput, None, None]:
        """Runs `requests` together. Yields each output once, when it is finished; with `stream`, at every step.
        Closing the iterator aborts the requests that are not finished."""
        unfinished = set()
        try:
            for request in requests:
                self.add(request, stream)
                unfinished.add(request.id)
            while unfinished:
                for output in self.step():
                    if output.request_id in self.behind:
                        self.behind[output.request_id] = output
                        continue
                    if output.finished:
                        unfinished.discard(output.request_id)
                    yield output
        finally:
            if unfinished:
                self.abort(unfinished)

    def run_behind(self, request: EngineRequest) -> RequestOutput:
        """Runs a request beside the batches of other threads, which need not wait for it: the engine's own scheduler
        runs it with theirs. Returns its output when it is finished."""
        with self.lock:
            self.add(request)
            self.behind[request.id] = None
        try:
            while True:
                with self.lock:
                    if self.behind[request.id] is None:
                        self._step_behind()
                    output = self.behind[request.id]
                    if output is not None:
                        return output
                while self.lock.waiting:  # a batch goes first, and takes this request along
                    time.sleep(PAUSE_S)
        finally:
            with self.lock:
                if self.behind.pop(request.id) is None:
                    with process.running(self.connector):
                        self.llm.llm_engine.abort_request([request.id])

    def _step_behind(self) -> None:
        for output in self.step():
            if output.request_id in self.behind:
                self.behind[output.request_id] = output

    def add(self, request: EngineRequest, stream: bool = False) -> None:
        """Adds a request to those that the engine's next steps run. With `stream`, each output has the new tokens only,
        otherwise there is one output, with all tokens."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        prompt: dict[str, Any] = {"prompt_token_ids": list(request.token_ids)}
        if request.salt:
            prompt["cache_salt"] = request.salt
        sampling, transfer = request.sampling, dict(request.transfer)
        if self.pins_to_release:
            transfer[UNPIN] = [self.pins_to_release.pop() for _ in range(len(self.pins_to_release))]
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            max_tokens=request.max_new_tokens,
            stop_token_ids=[] if request.past_end else self.end_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=request.top_logprobs,
            extra_args={"kv_transfer_params": transfer} if transfer else None,
            output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
        )
        with process.running(self.connector):
            self.llm.llm_engine.add_request(request.id, prompt, params)

    def step(self) -> list[RequestOutput]:
        """One step of the engine. Returns what it generated."""
        with process.running(self.connector):
            outputs: list[RequestOutput] = self.llm.llm_engine.step()
        return outputs

    def abort(self, request_ids: Collection[str]) -> None:
        """Ends requests that are not finished, without an output."""
        with process.running(self.connector):
            self.llm.llm_engine.abort_request(list(request_ids))

    def turn(self) -> AbstractContextManager[None]:
        """Inside it, `llm` may be called directly: no other engine of this process takes a step."""
        return process.running(self.connector)

    def reset_prefix_cache(self) -> None:
        """Empties the engine's prefix cache. Raises EngineError while a request holds blocks."""
        with self.lock:
            while any(output is None for output in self.behind.values()):
                self._step_behind()
            if self.pins_to_release:  # a request of one token carries them, with a salt that no other has
                release = EngineRequest((0,), 1, past_end=True)
                list(self.run([replace(release, salt=release.id)]))
            with process.running(self.connector):
                emptied = self.llm.reset_prefix_cache()
            ends = time.perf_counter() + LONGEST_DRAIN_S
            while self.drains and not emptied and time.perf_counter() < ends:
                step = EngineRequest((0,), 1, past_end=True)
                list(self.run([replace(step, salt=step.id)]))
                with process.running(self.connector):
                    emptied = self.llm.reset_prefix_cache()
            if not emptied:
                raise EngineError("The engine's prefix cache can't be emptied while a request uses it. Let it finish.")


def answer_of(output: RequestOutput, token_ids: Sequence[int] | None = None) -> EngineAnswer:
    """The answer of a finished output. token_ids: all tokens of a streamed one, which has only the last itself."""
    completion = output.outputs[0]
    report = (output.kv_transfer_params or {}).get(REPORT)
    logprobs = completion.logprobs
    return EngineAnswer(
        tuple(completion.token_ids if token_ids is None else token_ids),
        completion.finish_reason,
        output.num_cached_tokens or 0,
        None if report is None else Report.parse(report),
        logprobs and tuple({token: entry.logprob for token, entry in step.items()} for step in logprobs),
    )
