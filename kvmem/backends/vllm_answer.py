"""What a vLLM request came back with, once the engine's own count says that the memory spared it what it should."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from kvmem.backends.lent_file import LentFile
from kvmem.backends.vllm_config import VLLMGeneration
from kvmem.backends.vllm_connector import REPORT
from kvmem.errors import EngineError, InjectionError, KVMemError
from kvmem.prompt import TokenizedPrompt

if TYPE_CHECKING:
    from vllm import RequestOutput


def verified(
    output: RequestOutput, prompt: TokenizedPrompt, lent: LentFile | None, may_recompute: bool,
    end_tokens: Collection[int], decode: Callable[[Sequence[int]], str],
) -> VLLMGeneration | KVMemError:
    """The answer, or why it is none: the engine gave up, or a hit is not what prompt and memory promise.

    may_recompute: a memory that could not be loaded is counted as recomputed, and is no error.
    """
    completion = output.outputs[0]
    if completion.finish_reason == "error":
        return EngineError("The engine gave up the request; its log says why.")
    report = (output.kv_transfer_params or {}).get(REPORT)
    counted = output.num_cached_tokens or 0
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
    if not failed and lent is not None and lent.file is not None and cached < expected:
        return InjectionError(f"Of the {expected} tokens that memory and prompt share, the engine reused {cached}.")
    ids = tuple(completion.token_ids)
    if ids and ids[-1] in end_tokens and completion.finish_reason == "stop":
        ids = ids[:-1]
    return VLLMGeneration(
        decode(ids), ids, len(prompt.ids), cached, local, injected, max(expected - cached, 0) if failed else 0,
        preemptions,
    )
