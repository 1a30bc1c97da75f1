"""What a memory from a compressed tier loses, beside what its scheme states: in its KV, in likelihood, in agreement."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experiments.bench.stored_kv import distance
from experiments.measurement import Layers, comparable
from experiments.results import Loss
from kvmem import KVCacheItem
from kvmem.cache import dynamic_cache
from kvmem.engines.huggingface import HFBackend
from kvmem.errors import ConfigError

SCORED_TOKENS, LEAST_SCORED = 64, 2


@dataclass(frozen=True)
class StatedLoss:
    """What a scheme loses at most. A run in which it loses more is invalid."""

    kv_off: float
    """The largest relative distance of a token's keys or values in a layer."""
    nll_above: float
    """Nats a token."""
    agreement_pct: float
    """The least share of next tokens that stay the same."""


STATED_LOSSES = {
    "int8": StatedLoss(kv_off=0.05, nll_above=0.05, agreement_pct=95.0),
    "int4": StatedLoss(kv_off=0.5, nll_above=0.25, agreement_pct=80.0),
}
"""By scheme. Measured (SmolLM2-135M, Qwen3-8B, 128 to 6,064 tokens): at most 0.012 nats for int8, 0.12 for int4;
the KV (SmolLM2) at most 0.012 and 0.21 off, and the same next tokens 100% and 95%."""


@dataclass(frozen=True)
class Score:
    """How well a model predicts the last tokens of a memory's text from the memory's KV."""

    nll: float
    """The mean negative log-likelihood, in nats a token."""
    likeliest: tuple[int, ...]
    """The most likely token at each scored position."""

    def agreement_pct(self, other: Score) -> float:
        """The share of positions with the same most likely token."""
        same = sum(a == b for a, b in zip(self.likeliest, other.likeliest, strict=True))
        return 100 * same / len(self.likeliest)


def loss_of(backend: HFBackend, scheme: str, item: KVCacheItem, built: Layers, exact: Score | None) -> Loss:
    """The loss of `item`, read from a tier with `scheme`, against the exact keys and values `built` and their score."""
    stated, nll_above, agreement_pct = STATED_LOSSES[scheme], None, None
    if exact is not None and (found := score(backend, item)) is not None:
        nll_above, agreement_pct = found.nll - exact.nll, found.agreement_pct(exact)
    return Loss(
        method=scheme,
        kv_off=kv_distance(item, built),
        most_kv_off=stated.kv_off,
        nll_above=nll_above,
        most_nll_above=stated.nll_above,
        agreement_pct=agreement_pct,
        least_agreement_pct=stated.agreement_pct,
    )


def kv_distance(item: KVCacheItem, built: Layers) -> float:
    """The largest relative distance of a token's KV from `built`: (heads, tokens, head_dim) in each layer."""
    return distance(comparable(item.kv_cache), built)


@torch.inference_mode()
def score(backend: HFBackend, item: KVCacheItem) -> Score | None:
    """Scores the last tokens of a memory's text, given the cache of the others.

    The text is real, not chosen by the model, and every scored token attends to the cache from the tier. At most 64
    tokens and half of the memory are scored. Returns None if fewer than 2 tokens can be scored. Raises ConfigError if
    the model has sliding-window attention.
    """
    tokens = item.metadata.tokens
    scored = min(SCORED_TOKENS, len(tokens.body_ids) // 2)
    if scored < LEAST_SCORED:
        return None
    start = tokens.body_end - scored - 1  # the token before the first scored one predicts it
    cache = dynamic_cache.view_of(item.kv_cache, tokens, backend.model_config, item.metadata.lossy, backend.fingerprint)
    if not dynamic_cache.crop(cache, start):
        raise ConfigError(
            "Scoring a memory's text needs full attention, and this model has a sliding window. Use a model with full "
            "attention, or scenario.compressed=[]."
        )
    ids = torch.tensor([tokens.token_ids[start : tokens.body_end]], device=backend.device)
    logits_TV = backend.model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True).logits[0].float()
    return Score(
        float(torch.nn.functional.cross_entropy(logits_TV, ids[0, 1:])),
        tuple(int(token) for token in logits_TV.argmax(dim=1)),
    )
