"""vLLM's own `LLM.generate` on token ids, for comparison with kvmem's requests to the same engine.

Importing this module does not import vLLM.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmem.engines import FirstToken
from kvmem.prompt import TokenizedPrompt

if TYPE_CHECKING:
    from vllm import LLM

TOP_LOGPROBS = 20


@dataclass(frozen=True)
class ColdAnswer:
    """Greedy tokens, and the largest log-probabilities of each step by token."""

    token_ids: tuple[int, ...]
    logprobs: tuple[dict[int, float], ...]

    def margin(self, token_ids: Sequence[int]) -> float:
        """By how much this answer prefers its own token where `token_ids` first differs; 0 for the same tokens.

        Infinity for a token that is not among the likeliest, or for a shorter answer.
        """
        for step, own in enumerate(self.token_ids):
            other = token_ids[step] if step < len(token_ids) else None
            if other != own:
                return self.logprobs[step][own] - self.logprobs[step].get(-1 if other is None else other, -math.inf)
        return 0.0


def first_token(llm: LLM, prompt: TokenizedPrompt) -> FirstToken:
    """The first greedy token after `prompt`. The engine uses what its prefix cache holds of the prompt."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, ignore_eos=True)
    (output,) = llm.generate([{"prompt_token_ids": list(prompt.ids)}], params, use_tqdm=False)
    cached = output.num_cached_tokens or 0
    return FirstToken(output.outputs[0].token_ids[0], cached, cached)


def cold_answers(llm: LLM, prompts: Sequence[Sequence[int]], steps: int) -> list[ColdAnswer]:
    """`steps` greedy tokens for each prompt, computed whole: each has a salt of its own, so that none shares blocks."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=steps, detokenize=False, ignore_eos=True, logprobs=TOP_LOGPROBS)
    salted = [{"prompt_token_ids": list(ids), "cache_salt": uuid.uuid4().hex} for ids in prompts]
    found = []
    for output in llm.generate(salted, params, use_tqdm=False):
        completion = output.outputs[0]
        steps_logprobs = [{token: entry.logprob for token, entry in step.items()} for step in completion.logprobs or ()]
        found.append(ColdAnswer(tuple(completion.token_ids), tuple(steps_logprobs)))
    return found
