"""What a compressed tier costs in quality: the grade of its answer, and how likely the memory's own text still is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experiments.measurement import Equality, Trace, grade, ttft
from kvmem import KVCacheItem
from kvmem.cache import dynamic_cache
from kvmem.engines.huggingface import HFBackend
from kvmem.errors import ConfigError
from kvmem.prompt import TokenizedPrompt

SCORED_TOKENS, LEAST_SCORED = 64, 2


@dataclass(frozen=True)
class Quality:
    """`nll`: negative log-likelihood in nats a token, lower is better; None: the memory is too short to tell."""

    equality: Equality
    nll: float | None


def graded(backend: HFBackend, item: KVCacheItem, prompt: TokenizedPrompt, direct: Trace) -> Quality:
    """The grade of an answer behind `item`, beside that of the prompt sent whole, and `item`'s likelihood."""
    injected = ttft.trace(backend, prompt, lambda: _view(backend, item), len(direct.token_ids))
    equality = grade(
        direct,
        injected,
        lambda step: ttft.rounding_noise(backend, prompt.ids + direct.token_ids[:step], len(prompt.memory_ids)),
    )
    return Quality(equality, nll(backend, item))


@torch.inference_mode()
def nll(backend: HFBackend, item: KVCacheItem) -> float | None:
    """Mean negative log-likelihood, in nats, of the last tokens of the memory's text behind the KV of all before them.

    Real text that the model did not choose, and every scored token attends to what the tier gave back. Up to 64 tokens
    are scored, half the memory at most; None where that is fewer than 2, for one token tells nothing.
    """
    tokens = item.metadata.tokens
    scored = min(SCORED_TOKENS, len(tokens.body_ids) // 2)
    if scored < LEAST_SCORED:
        return None
    start = tokens.body_end - scored - 1  # the token before the first that is scored predicts it
    cache = _view(backend, item)
    if not dynamic_cache.crop(cache, start):
        raise ConfigError("The likelihood of a memory's text needs full attention; this model has a sliding window.")
    ids = torch.tensor([tokens.token_ids[start : tokens.body_end]], device=backend.device)
    logits_TV = backend.model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True).logits[0].float()
    return float(torch.nn.functional.cross_entropy(logits_TV, ids[0, 1:]))


def _view(backend: HFBackend, item: KVCacheItem) -> dynamic_cache.CacheView:
    config, metadata = backend.model_config, item.metadata
    return dynamic_cache.view_of(item.kv_cache, metadata.tokens, config, metadata.lossy, backend.fingerprint)
