"""The fast engine for the weights of a Hugging Face model: in-place caches and, on a GPU, CUDA graphs.

Items are the same as on backend=huggingface, so both engines can use each other's memories.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from transformers import DynamicCache

from kvmem.cache import CacheView, KVCacheItem, dynamic_cache
from kvmem.engines.base import BetweenLayers, FirstToken
from kvmem.engines.generation import Generation, Sampler, Sampling, check_generation, greedy_token
from kvmem.engines.graph.config import GraphConfig
from kvmem.engines.graph.engine import Engine, RunningSequence
from kvmem.engines.graph.shared_prefix_batch import SharedPrefixBatch
from kvmem.engines.huggingface import HFBackend, HFConfig, held_by
from kvmem.errors import check_kind
from kvmem.merge import MergeStrategy
from kvmem.models import loading
from kvmem.prompt import Query, TemplateKind, TokenizedPrompt


@dataclass(config=ConfigDict(extra="forbid", protected_namespaces=()))
class HFGraphConfig(GraphConfig, HFConfig):
    """The keys of `extractor_llm["config"]` for the backend `hf_graph`: those of `huggingface` and of `GraphConfig`.

    `attn_implementation` applies to merges, which transformers computes.
    """

    backend: ClassVar[str] = "hf_graph"


class HFGraphBackend(HFBackend):
    """`HFBackend` with another forward pass.

    The weights are shared with the model. A model that changed after opening is refused until `adopt_model`.
    """

    name: ClassVar[str] = HFGraphConfig.backend
    config_class: ClassVar[type] = HFGraphConfig
    grows_views: ClassVar[bool] = False
    takes_compacted: ClassVar[bool] = False
    answers_together: ClassVar[bool] = True

    def __init__(
        self,
        loaded: loading.Loaded,
        template: TemplateKind = "chat",
        config: GraphConfig | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(loaded, template, chat_template_kwargs)
        self.engine = Engine(loaded.model, config or GraphConfig())
        self.attention = self.engine.kernel
        self.guard.check()  # the engine has stacked the weights, which is a sign of a change

    @classmethod
    def open(  # type: ignore[override] # each engine opens its own kind of configuration
        cls,
        config: HFGraphConfig,
        template: TemplateKind = "chat",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> HFGraphBackend:
        return cls(cls.loaded(config), template, config, chat_template_kwargs)

    def adopt_model(self) -> None:
        """As the base engine's. Weights that were written in place stay shared; replaced ones are taken over.

        Raises ModelError if the changed model is not covered, such as one with an adapter that is not merged.
        """
        self.engine = Engine(self.model, self.engine.config)
        super().adopt_model()

    def check_model(self, by_transformers: bool = True) -> None:
        """As the base engine's. Code, attributes and configuration matter only where transformers computes (merges):
        this engine keeps those that the model had when it was opened."""
        if by_transformers:
            self.guard.check()
        else:
            self.guard.check_weights()

    def view(self, items: Sequence[KVCacheItem], merge: MergeStrategy, separator: str) -> CacheView:
        cache_view = super().view(items, merge, separator)
        self.engine.place(cache_view)
        return cache_view

    def prefill(
        self, prompt: TokenizedPrompt, kv_cache: CacheView | None = None
    ) -> tuple[torch.Tensor, RunningSequence]:
        """The last token's logits, (vocab,), and the running sequence. Changes nothing in `kv_cache` but `kept`."""
        held = len(prompt.memory_ids) if kv_cache else 0
        ends_at = self._kept_tokens(prompt, kv_cache, held)
        started = time.perf_counter()
        logits_V, sequence = self.engine.begin(kv_cache, held, _new_ids(prompt, kv_cache))
        new = len(prompt.ids) - held
        seconds = self._prefilled_s(started, kv_cache, new, held) if kv_cache is not None else 0.0
        if ends_at and kv_cache is not None:
            copied = dynamic_cache.from_layers(self.engine.read(sequence, ends_at), self.model_config)
            kv_cache.kept = self._kept(prompt, kv_cache, copied, seconds)
        return logits_V, sequence

    def first_token(self, prompt: TokenizedPrompt, kv_cache: CacheView | None = None) -> FirstToken:
        held = len(prompt.memory_ids) if kv_cache else 0
        if self._kept_tokens(prompt, kv_cache, held):
            logits_V, _ = self.prefill(prompt, kv_cache)
            return FirstToken(greedy_token(logits_V), held, logits_V=logits_V)
        token, logits_V = self.engine.first_token(kv_cache, held, _new_ids(prompt, kv_cache))
        return FirstToken(token, held, logits_V=logits_V)

    def reset(self) -> None:
        """Overwrites the buffers, so that a memory that lies in one already is placed again, and timed."""
        self.engine.overwrite()

    def extend(self, token_ids: Sequence[int], state: RunningSequence) -> torch.Tensor:
        return self.engine.extend(state, token_ids)

    def decode_one_token(self, token_id: int, state: RunningSequence) -> torch.Tensor:
        return self.engine.extend(state, (token_id,))

    def generate(
        self,
        query: Query,
        kv_cache: CacheView | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
    ) -> Generation:
        check_generation(max_new_tokens, sampling)
        if sampling and sampling.temperature > 0:
            return super().generate(query, kv_cache, max_new_tokens, sampling)
        self.guard.check_mode()
        prompt = self.split(query, kv_cache, True)
        possible = self.room(prompt, max_new_tokens)
        logits_V, answer = self.prefill(prompt, kv_cache)
        self.check_model(by_transformers=False)  # while the GPU computes, and before a token of it is given out
        first = greedy_token(logits_V)
        ends = self.end_tokens
        ids = () if first in ends else (first, *self.engine.greedy(answer, first, possible - 1, ends))
        return self.generation(ids, prompt, len(prompt.memory_ids), kv_cache, possible, max_new_tokens)

    def room(self, prompt: TokenizedPrompt, max_new_tokens: int) -> int:
        """As the base engine's, for the smaller of the model's positions and `capacity_tokens`.

        Raises CapacityError if the prompt fills a buffer.
        """
        self.engine.check_room(len(prompt.ids) + 1)
        return super().room(prompt, max_new_tokens)

    def answer_batch(
        self,
        queries: Sequence[Query],
        kv_cache: CacheView,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
    ) -> list[Generation]:
        """As the base engine's, all in one pass. The memory is in place once for all of them."""
        check_generation(max_new_tokens, sampling)
        check_kind("queries", queries, list, tuple, way_out="For one query, use generate.")
        if not queries:
            return []
        prompts = [self.split(query, kv_cache) for query in queries]
        held = min(len(prompt.memory_ids) for prompt in prompts)
        if held == 0:
            return [self.generate(query, kv_cache, max_new_tokens, sampling) for query in queries]
        new = [prompt.ids[held:] for prompt in prompts]
        possible = [self.room(prompt, max_new_tokens) for prompt in prompts]
        rows = max(len(ids) + tokens - 1 for ids, tokens in zip(new, possible, strict=True))
        batch = SharedPrefixBatch(self.engine, kv_cache, held, len(new), rows)
        samplers = [Sampler(sampling or Sampling(), self.device) for _ in prompts]
        answers: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        logits_BV = batch.extend(new)
        for step in range(max(possible)):
            tokens = [sampler.pick(logits_V) for sampler, logits_V in zip(samplers, logits_BV, strict=True)]
            running -= {i for i in running if tokens[i] in self.end_tokens}
            for i in running:
                answers[i].append(tokens[i])
            running -= {i for i in running if step + 1 == possible[i]}
            if not running:
                break
            logits_BV = batch.extend([(token,) for token in tokens])
        return [
            self.generation(answer, prompt, held, kv_cache, tokens, max_new_tokens)
            for answer, prompt, tokens in zip(answers, prompts, possible, strict=True)
        ]

    @cached_property
    def eager(self) -> HFBackend:
        """The same weights with transformers' own forward pass."""
        same = loading.Loaded(self.model, self.tokenizer, self.fingerprint.origin)
        return HFBackend(same, self.template.kind, self.template.kwargs)

    @property
    def max_tokens(self) -> int:
        return min(super().max_tokens, self.engine.config.capacity_tokens)

    def _prefilled(
        self, token_ids: tuple[int, ...], base: KVCacheItem | None, between_layers: BetweenLayers | None
    ) -> DynamicCache:
        cache, held = (None, 0) if base is None else (base.kv_cache, held_by(base, token_ids))
        if between_layers is not None:
            layers = self.engine.build_by_layer(cache, held, token_ids[held:], between_layers)
            return dynamic_cache.from_layers(layers, self.model_config)
        _, answer = self.engine.begin(cache, held, token_ids[held:])
        return dynamic_cache.from_layers(self.engine.read(answer), self.model_config)


def _new_ids(prompt: TokenizedPrompt, kv_cache: CacheView | None) -> tuple[int, ...]:
    return prompt.ids if kv_cache is None else prompt.query_ids
