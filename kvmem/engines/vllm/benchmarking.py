"""What measurements need from a vLLM engine: single tokens, log-probabilities, cold prefills, and its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from kvmem.engines.base import FirstToken, GreedyAnswer, Injectable
from kvmem.engines.vllm.file_injection import FileInjectingEngine
from kvmem.engines.vllm.memory_files import as_file_handle
from kvmem.engines.vllm.requests import GenerationRequest
from kvmem.prompt import TokenizedPrompt

if TYPE_CHECKING:
    from vllm import LLM

TOP_LOGPROBS = 20
"""The most log-probabilities that an engine returns by default."""


class Benchmarking:
    """Measures one engine. `reset` empties its prefix cache, whose blocks have `block_tokens` tokens."""

    def __init__(self, engine: FileInjectingEngine, reset: Callable[[], None], block_tokens: int) -> None:
        self.engine = engine
        self.reset = reset
        self.block_tokens = block_tokens

    def first_token(self, prompt: TokenizedPrompt, kv_cache: Injectable | None = None) -> FirstToken:
        """The first greedy token, with the engine's own counts."""
        answer = self.engine.answer_prompt(prompt, kv_cache, 1)
        return FirstToken(answer.token_ids[0], answer.cached_tokens, answer.local_tokens)

    def greedy(self, prompt: TokenizedPrompt, kv_cache: Injectable | None, steps: int) -> GreedyAnswer:
        """`steps` greedy tokens, with the largest log-probabilities of each step; all others are -inf."""
        request = GenerationRequest(prompt, kv_cache, steps, past_end=True)
        answer = self.engine.submit(replace(self.engine.engine_request(prompt, request), top_logprobs=TOP_LOGPROBS))
        self.engine.verify(answer, prompt, request)
        logits_SV = torch.full((len(answer.token_ids), self.engine.model_config.vocab_size), -torch.inf)
        for step, logprobs in enumerate(answer.logprobs or ()):
            logits_SV[step, list(logprobs)] = torch.tensor(list(logprobs.values()))
        return GreedyAnswer(answer.token_ids, logits_SV, complete=False)

    def two_chunkings(self, token_ids: Sequence[int], at: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The last token's logits, (vocab,), of a prompt prefilled whole, and behind its first blocks in the cache."""
        ids = tuple(token_ids)
        whole, first_part = TokenizedPrompt((), ids), TokenizedPrompt((), ids[: self._whole_blocks(at, len(ids))])
        self.reset()
        one_chunk_V = self.greedy(whole, None, 1).logits_SV[0]
        self.reset()
        if first_part.ids:
            self.first_token(first_part)
        return one_chunk_V, self.greedy(whole, None, 1).logits_SV[0]

    def held_tokens(self, prompt: TokenizedPrompt, kv_cache: Injectable) -> int:
        """How many prompt tokens a hit spares: all of a memory's file, or the whole blocks of a joined prefix."""
        cache_view = as_file_handle(kv_cache)
        if cache_view is not None and cache_view.file is not None:
            return len(prompt.memory_ids)
        return len(prompt.memory_ids) // self.block_tokens * self.block_tokens

    def _whole_blocks(self, at: int, tokens: int) -> int:
        """About `at` of `tokens` tokens, rounded to whole blocks that leave at least one token to compute."""
        blocks = max(round(at / self.block_tokens), 1)
        return min(blocks, (tokens - 1) // self.block_tokens) * self.block_tokens


def attention_of(llm: LLM) -> str:
    """The name of the attention backend; "vllm" if the layers are in other processes."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    names = {layer.attn_backend.get_name() for layer in layers if "attn_backend" in vars(layer)}
    return " + ".join(sorted(names)) or "vllm"


def block_tokens_of(llm: LLM) -> int:
    """Tokens of a block of the engine's prefix cache."""
    return int(llm.llm_engine.vllm_config.cache_config.block_size)


def conditions_of(llm: LLM) -> dict[str, Any]:
    """The settings that the engine's times depend on, as plain JSON."""
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
