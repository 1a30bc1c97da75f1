"""What a vLLM request came back with, once the engine's own count says that the memory spared it what it should."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvmem.cache import KVCacheMetadata, MemoryTokens, ModelFingerprint, TextualMemoryItem, TextualSource
from kvmem.engines.base import FileHandle
from kvmem.engines.vllm.config import VLLMGeneration
from kvmem.engines.vllm.connector import REPORT
from kvmem.errors import EngineError, InjectionError, KVMemError
from kvmem.prompt import TokenizedPrompt
from kvmem.storage import ItemManifest

if TYPE_CHECKING:
    from vllm import RequestOutput


@dataclass(frozen=True)
class EngineAnswer:
    """What an engine said, in this process or over HTTP. `report`: our connector's, where the request asked it."""

    token_ids: tuple[int, ...]
    finish_reason: str | None
    cached_tokens: int
    """The engine's own count of prompt tokens that it took from any cache, made when it starts on the prompt."""
    report: dict[str, Any] | None


def answer_of(output: RequestOutput) -> EngineAnswer:
    completion = output.outputs[0]
    report = (output.kv_transfer_params or {}).get(REPORT)
    return EngineAnswer(tuple(completion.token_ids), completion.finish_reason, output.num_cached_tokens or 0, report)


def verified(
    answer: EngineAnswer,
    prompt: TokenizedPrompt,
    cache_view: FileHandle | None,
    may_recompute: bool,
    end_tokens: Collection[int],
    decode: Callable[[Sequence[int]], str],
) -> VLLMGeneration | KVMemError:
    """The answer, or why it is none: the engine gave up, or a hit is not what prompt and memory promise.

    may_recompute: a memory that could not be loaded is counted as recomputed, and is no error.
    """
    if answer.finish_reason == "error":
        return EngineError("The engine gave up the request; its log says why.")
    report, counted = answer.report, answer.cached_tokens
    local, injected, failed, preemptions = counted, 0, "", 0
    if report:
        local, injected = report["local_tokens"], report["injected_tokens"]
        failed, preemptions = report["load_error"], report["preemptions"]
    expected, cached = len(prompt.memory_ids), local + injected
    if failed and not may_recompute:
        return InjectionError(f"The memory was not injected: {failed} Or use on_load_failure='recompute'.")
    if not failed and cached != counted:
        return InjectionError(
            f"The engine counts {counted} cached tokens, and the connector {cached}. Don't trust this hit."
        )
    if not failed and cache_view is not None and cache_view.file is not None and cached < expected:
        return InjectionError(f"Of the {expected} tokens that memory and prompt share, the engine reused {cached}.")
    ids = answer.token_ids
    if ids and ids[-1] in end_tokens and answer.finish_reason == "stop":
        ids = ids[:-1]
    return VLLMGeneration(
        decode(ids),
        ids,
        len(prompt.ids),
        cached,
        local_tokens=local,
        injected_tokens=injected,
        recomputed_tokens=max(expected - cached, 0) if failed else 0,
        preemptions=preemptions,
    )


BUILD_TOKENS = 2
"""A build generates two tokens, for a failed save is known one step after the prompt's last."""


def announced(
    tokens: MemoryTokens, fingerprint: ModelFingerprint, textual_memory: TextualMemoryItem | None
) -> ItemManifest:
    """What the saved file says of itself; how long the build took is not known yet."""
    count = len(tokens.token_ids)
    source = None
    if textual_memory is not None:
        source = TextualSource(id=textual_memory.id, metadata=textual_memory.metadata)
    metadata = KVCacheMetadata(
        tokens=tokens,
        build_s=0.0,
        kv_bytes=fingerprint.kv_bytes(count),
        fingerprint=fingerprint,
        textual_memory=source,
    )
    return ItemManifest(kv_cache_id=str(uuid.uuid4()), cache_tokens=count, layers=fingerprint.layers, metadata=metadata)


def not_saved(report: dict[str, Any], may_recompute: bool) -> str:
    """The connector's reason, if the file was not saved or its base was not loaded; else nothing."""
    return str(report["save_error"] or (not may_recompute and report["load_error"]) or "")
