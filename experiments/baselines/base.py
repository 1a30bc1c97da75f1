"""The interface of a baseline recipe, a simple method of passing a stored cache to a Hugging Face model."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from transformers import DynamicCache, PreTrainedConfig

from experiments.measurement import Sample, Trace, synchronize, ttft
from kvmem.cache import KVCacheItem, MemoryTokens
from kvmem.engines import FirstToken, MeasuredBackend
from kvmem.engines.huggingface import HFBackend
from kvmem.errors import ConfigError
from kvmem.models import decode_one_token
from kvmem.prompt import TokenizedPrompt
from kvmem.registry import Registry


class Recipe(ABC):
    """Prepares a stored cache for a query. Each cell has its own instance. A new recipe is one new file."""

    name: ClassVar[str]
    logits_to_keep: ClassVar[int] = 1
    """The number of positions, from the last, whose logits the model computes; 0 means all, the model's default."""

    def __init__(self, item: KVCacheItem, config: PreTrainedConfig) -> None:
        self.item, self.config = item, config

    @abstractmethod
    def cache(self) -> DynamicCache:
        """The cache for the prefill of a query."""

    def restore(self, cache: DynamicCache) -> None:
        """Restores the stored cache for the next query. Its time does not count."""
        return

    @torch.inference_mode()
    def first_token(self, backend: HFBackend, prompt: TokenizedPrompt) -> Sample:
        """Measures one first token: `cache_s` prepares the cache, `engine_s` is the forward, `user_s` is the sum."""
        started = time.perf_counter()
        cache = self.cache()
        synchronize(backend.device)
        ready = time.perf_counter()
        token = int(self._logits(backend, prompt, cache).argmax())
        done = time.perf_counter()
        self.restore(cache)
        cached_tokens = len(prompt.memory_ids)
        first = FirstToken(token, cached_tokens)
        return Sample(done - ready, done - started, ready - started, first, prompt, cached_tokens)

    @torch.inference_mode()
    def trace(self, backend: HFBackend, prompt: TokenizedPrompt, steps: int) -> Trace:
        """A greedy answer of `steps` tokens, with the logits of each."""
        cache = self.cache()
        logits = [self._logits(backend, prompt, cache)]
        for _ in range(steps - 1):
            logits.append(decode_one_token(backend.model, int(logits[-1].argmax()), cache))
        self.restore(cache)
        return Trace(tuple(int(row_V.argmax()) for row_V in logits), torch.stack(logits).float().cpu(), True)

    def _logits(self, backend: HFBackend, prompt: TokenizedPrompt, cache: DynamicCache) -> torch.Tensor:
        ids_BT = torch.tensor([prompt.query_ids], device=backend.device)
        logits_BTV: torch.Tensor = backend.model(
            input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=self.logits_to_keep
        ).logits
        return logits_BTV[0, -1]


def recipes() -> dict[str, type[Recipe]]:
    """Every recipe, by name."""
    return Registry(Recipe, "experiments.baselines", "recipe").classes()


def arm(name: str, backend: MeasuredBackend, item: KVCacheItem, tokens: MemoryTokens) -> ttft.Arm:
    """A recipe as an arm of a comparison. Raises ConfigError if the engine is not Hugging Face's."""
    if not isinstance(backend, HFBackend):
        raise ConfigError(f"The {name} recipe is Hugging Face's, and this is backend={type(backend).name}.")
    recipe, template = recipes()[name](item, backend.model_config), backend.template
    return ttft.Arm(lambda query: recipe.first_token(backend, template.split(tokens, query)))
