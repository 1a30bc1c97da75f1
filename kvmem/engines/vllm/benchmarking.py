"""What a vLLM engine tells about itself and its answers: kernel, blocks, graphs, log-probabilities."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from kvmem.engines.base import FileHandle, FirstToken, GreedyAnswer, MeasuredBackend
from kvmem.engines.vllm.config import VLLMGeneration
from kvmem.prompt import TokenizedPrompt

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

TOP_LOGPROBS = 20
"""The most that an engine tells by default."""


class MeasuredEngine(MeasuredBackend):
    """The part of VLLMBackend that experiments measure."""

    llm: LLM
    prefix_block_tokens: int

    @abstractmethod
    def _answer_prompt(
        self,
        prompt: TokenizedPrompt,
        kv_cache: FileHandle | None,
        max_new_tokens: int,
        cache_salt: str | None = None,
        top_logprobs: int | None = None,
    ) -> tuple[VLLMGeneration, RequestOutput]:
        """Greedy tokens past end tokens, and what the engine gave."""

    def first_token(self, prompt: TokenizedPrompt, kv_cache: FileHandle | None = None) -> FirstToken:
        answer, _ = self._answer_prompt(prompt, kv_cache, 1)
        return FirstToken(answer.token_ids[0], answer.cached_tokens, answer.local_tokens)

    def greedy(self, prompt: TokenizedPrompt, kv_cache: FileHandle | None, steps: int) -> GreedyAnswer:
        _, output = self._answer_prompt(prompt, kv_cache, steps, top_logprobs=TOP_LOGPROBS)
        return _greedy_answer(output, self.model_config.vocab_size)

    def two_chunkings(self, token_ids: Sequence[int], at: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The second part is computed behind the first one's blocks, which lie in the engine's prefix cache."""
        ids = tuple(token_ids)
        whole, first_part = TokenizedPrompt((), ids), TokenizedPrompt((), ids[: self._whole_blocks(at, len(ids))])
        self.reset()
        at_once = self.greedy(whole, None, 1).logits_SV[0]
        self.reset()
        if first_part.ids:
            self.first_token(first_part)
        return at_once, self.greedy(whole, None, 1).logits_SV[0]

    def held_tokens(self, prompt: TokenizedPrompt, kv_cache: FileHandle) -> int:
        """A memory's file to the token; a joined prefix in whole blocks."""
        if kv_cache.file is not None:
            return len(prompt.memory_ids)
        return len(prompt.memory_ids) // self.prefix_block_tokens * self.prefix_block_tokens

    def conditions(self) -> dict[str, Any]:
        return _conditions(self.llm)

    def _whole_blocks(self, at: int, tokens: int) -> int:
        """About `at` of so many tokens, in whole blocks that leave one to compute."""
        blocks = max(round(at / self.prefix_block_tokens), 1)
        return min(blocks, (tokens - 1) // self.prefix_block_tokens) * self.prefix_block_tokens


def attention(llm: LLM) -> str:
    """The attention backend's name; "vllm" where the layers live in other processes."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    names = {layer.attn_backend.get_name() for layer in layers if "attn_backend" in vars(layer)}
    return " + ".join(sorted(names)) or "vllm"


def block_tokens(llm: LLM) -> int:
    return llm.llm_engine.vllm_config.cache_config.block_size


def _conditions(llm: LLM) -> dict[str, Any]:
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


def _greedy_answer(output: RequestOutput, vocab_size: int) -> GreedyAnswer:
    """Its tokens, and the log-probabilities that it tells, (steps, vocab), -inf for the others."""
    completion = output.outputs[0]
    assert completion.logprobs is not None  # they were asked for
    logits_SV = torch.full((len(completion.token_ids), vocab_size), -torch.inf)
    for step, told in enumerate(completion.logprobs):
        for token, value in told.items():
            logits_SV[step, token] = value.logprob
    return GreedyAnswer(tuple(completion.token_ids), logits_SV, complete=False)
