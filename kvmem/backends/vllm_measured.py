"""What a vLLM engine tells about itself and its answers: kernel, blocks, graphs, log-probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kvmem.backends.measured import GreedyAnswer

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

TOP_LOGPROBS = 20
"""The most that an engine tells by default."""


def attention(llm: LLM) -> str:
    """The attention backend's name; "vllm" where the layers live in other processes."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    names = {layer.attn_backend.get_name() for layer in layers if "attn_backend" in vars(layer)}
    return " + ".join(sorted(names)) or "vllm"


def block_tokens(llm: LLM) -> int:
    return llm.llm_engine.vllm_config.cache_config.block_size


def conditions(llm: LLM) -> dict[str, Any]:
    from vllm import __version__

    config = llm.llm_engine.vllm_config
    mode = config.compilation_config.cudagraph_mode
    return {
        "vllm": __version__,
        "graphs": f"vLLM's {mode.name}" if mode is not None and mode.name != "NONE" else "none (eager)",
        "block_tokens": config.cache_config.block_size,
        "tensor_parallel": config.parallel_config.tensor_parallel_size,
        "blocks": config.cache_config.num_gpu_blocks,
    }


def greedy_answer(output: RequestOutput, vocab_size: int) -> GreedyAnswer:
    """Its tokens, and the log-probabilities that it tells, (steps, vocab), -inf for the others."""
    completion = output.outputs[0]
    assert completion.logprobs is not None  # they were asked for
    logits_SV = torch.full((len(completion.token_ids), vocab_size), -torch.inf)
    for step, told in enumerate(completion.logprobs):
        for token, value in told.items():
            logits_SV[step, token] = value.logprob
    return GreedyAnswer(tuple(completion.token_ids), logits_SV, complete=False)
