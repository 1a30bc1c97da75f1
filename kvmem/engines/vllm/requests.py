"""Requests to a vLLM engine and their answers, verified by the engine's own counts. Does not import vLLM."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvmem.engines.base import FileHandle, Injectable
from kvmem.engines.generation import Generation, Sampling, finish_reason
from kvmem.engines.vllm.connector import Report
from kvmem.errors import EngineError, InjectionError
from kvmem.prompt import Query, TokenizedPrompt


@dataclass(frozen=True)
class GenerationRequest:
    """One request of a batch, as a caller states it."""

    query: Query | TokenizedPrompt
    """Text or turns to put behind the memory; or a whole prompt that is split already, which is sent as it is."""
    kv_cache: Injectable | None = None
    """What `get_cache` returned, or None: nothing is injected."""
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    cache_salt: str | None = None
    """Requests share the engine's blocks only with requests of the same salt: use one for each tenant."""
    past_end: bool = False
    """Continue past end tokens, as a measurement does."""


@dataclass(frozen=True)
class EngineRequest:
    """One request as it is sent to an engine, in token ids."""

    token_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    salt: str | None = None
    """Salt of the engine's blocks."""
    transfer: dict[str, Any] = field(default_factory=dict)
    """Orders to the connector: its protocol's keys."""
    past_end: bool = False
    """Continue past end tokens."""
    top_logprobs: int | None = None
    """How many log-probabilities to return for each token, largest first (engine in this process only)."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class EngineAnswer:
    """What an engine returned for an `EngineRequest`."""

    token_ids: tuple[int, ...]
    """With the end token, if the answer stopped at one."""
    finish_reason: str | None
    cached_tokens: int
    """The engine's own count of prompt tokens that it took from any cache, made when it starts on the prompt."""
    report: Report | None
    """The connector's report, if the request gave it an order."""
    logprobs: tuple[dict[int, float], ...] | None = None
    """For each token, log-probabilities by token id, if they were requested."""

    @property
    def text_ids(self) -> tuple[int, ...]:
        """The tokens without the end token."""
        return without_end(self.token_ids, self.finish_reason)


def without_end(token_ids: Sequence[int], finish_reason: str | None) -> tuple[int, ...]:
    """The last tokens of an answer without its end token, which engines return where they stop at one."""
    return tuple(token_ids[:-1] if finish_reason == "stop" else token_ids)


@dataclass(frozen=True)
class VLLMGeneration(Generation):
    """An answer, with the engine's own count of tokens that it did not compute: `cached_tokens` = local + injected."""

    local_tokens: int = 0
    """From the engine's prefix cache."""
    injected_tokens: int = 0
    """From the memory's file."""
    recomputed_tokens: int = 0
    """Tokens of the memory that the engine computed because they could not be reused, where that is allowed."""
    preemptions: int = 0
    """How often the engine, short of blocks, suspended the request and loaded and computed it again."""


def verified(
    answer: EngineAnswer,
    prompt: TokenizedPrompt,
    cache_view: FileHandle | None,
    may_recompute: bool,
    decode: Callable[[Sequence[int]], str],
    max_new_tokens: int,
) -> VLLMGeneration:
    """The answer as text, if the engine reused what memory and prompt promise.

    may_recompute: a memory that could not be loaded is counted as recomputed and is not an error.

    max_new_tokens: how many were asked for; the engine's window may have had room for fewer.

    Raises EngineError if the engine aborted the request, and InjectionError if the memory was not loaded, or the
    engine's count differs from the connector's, or is less than what memory and prompt share.
    """
    if answer.finish_reason not in ("stop", "length"):
        raise EngineError(
            "The engine ended the request before its answer was complete "
            f"({answer.finish_reason or 'no reason given'}). Its log says why."
        )
    report = answer.report or Report(local_tokens=answer.cached_tokens)
    expected, cached = len(prompt.memory_ids), report.local_tokens + report.injected_tokens
    if report.load_error:
        if not may_recompute:
            raise InjectionError(
                f"The memory was not injected: {report.load_error} Or use on_load_failure='recompute'."
            )
    elif cached != answer.cached_tokens:
        raise InjectionError(
            f"The engine counts {answer.cached_tokens} cached tokens, and the connector {cached}. "
            "This hit can't be trusted."
        )
    elif cache_view is not None and cache_view.file is not None and cached < expected:
        raise InjectionError(f"Of the {expected} tokens that memory and prompt share, the engine reused {cached}.")
    ids = answer.text_ids
    return VLLMGeneration(
        decode(ids),
        ids,
        len(prompt.ids),
        cached,
        finish_reason(len(answer.token_ids), len(answer.token_ids), max_new_tokens)
        if answer.finish_reason == "length"
        else "stop",
        local_tokens=report.local_tokens,
        injected_tokens=report.injected_tokens,
        recomputed_tokens=max(expected - cached, 0) if report.load_error else 0,
        preemptions=report.preemptions,
    )
