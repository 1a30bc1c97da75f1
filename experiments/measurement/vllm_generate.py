"""vLLM's own `LLM.generate` on token ids, for comparison with kvmem's requests to the same engine.

Importing this module does not import vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmem.engines import FirstToken
from kvmem.prompt import TokenizedPrompt

if TYPE_CHECKING:
    from vllm import LLM


def first_token(llm: LLM, prompt: TokenizedPrompt) -> FirstToken:
    """The first greedy token after `prompt`. The engine uses what its prefix cache holds of the prompt."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, ignore_eos=True)
    (output,) = llm.generate([{"prompt_token_ids": list(prompt.ids)}], params, use_tqdm=False)
    cached = output.num_cached_tokens or 0
    return FirstToken(output.outputs[0].token_ids[0], cached, cached)
