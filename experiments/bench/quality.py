"""The quality loss of a compressed tier: the grade of its answer, and the likelihood of the memory's own text."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experiments.measurement import Equality, Trace, grade, reference_forward, ttft
from kvmem import KVCacheItem
from kvmem.cache import dynamic_cache
from kvmem.engines.huggingface import HFBackend
from kvmem.errors import ConfigError
from kvmem.prompt import TokenizedPrompt

SCORED_TOKENS, LEAST_SCORED = 64, 2


@dataclass(frozen=True)
class Quality:
    """The quality of a memory from a lossy tier."""

    equality: Equality
    """The grade of its answer against the direct arm's."""
    nll: float | None
    """Negative log-likelihood in nats a token, where lower is better; None if the memory is too short to score."""


def quality_of(backend: HFBackend, item: KVCacheItem, prompt: TokenizedPrompt, direct: Trace) -> Quality:
    """Grades the answer with `item` injected against `direct`, and scores the memory's text with `item`'s cache."""
    injected = ttft.trace(backend, prompt, lambda: _view(backend, item), len(direct.token_ids))
    equality = grade(
        direct,
        injected,
        lambda step: reference_forward(backend).logits(prompt.ids, direct.token_ids, step),
        backend.dtype,
    )
    return Quality(equality, nll(backend, item))


@torch.inference_mode()
def nll(backend: HFBackend, item: KVCacheItem) -> float | None:
    """The mean negative log-likelihood, in nats, of the last tokens of a memory's text, given the cache of the others.

    The text is real, not chosen by the model, and every scored token attends to the cache from the tier. At most 64
    tokens and half of the memory are scored. Returns None if fewer than 2 tokens can be scored. Raises ConfigError if
    the model has sliding-window attention.
    """
    tokens = item.metadata.tokens
    scored = min(SCORED_TOKENS, len(tokens.body_ids) // 2)
    if scored < LEAST_SCORED:
        return None
    start = tokens.body_end - scored - 1  # the token before the first scored one predicts it
    cache = _view(backend, item)
    if not dynamic_cache.crop(cache, start):
        raise ConfigError(
            "Scoring a memory's text needs full attention, and this model has a sliding window. Use a model with full "
            "attention, or scenario.compressed=[]."
        )
    ids = torch.tensor([tokens.token_ids[start : tokens.body_end]], device=backend.device)
    logits_TV = backend.model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True).logits[0].float()
    return float(torch.nn.functional.cross_entropy(logits_TV, ids[0, 1:]))


def _view(backend: HFBackend, item: KVCacheItem) -> dynamic_cache.CacheView:
    config, metadata = backend.model_config, item.metadata
    return dynamic_cache.view_of(item.kv_cache, metadata.tokens, config, metadata.lossy, backend.fingerprint)
