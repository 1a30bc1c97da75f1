"""The interface of a compaction strategy, and what it is given."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from kvmem.cache import BIAS, KV, PACKED_KEYS, PACKED_VALUES, KVCacheItem, dynamic_cache
from kvmem.compaction.observed_queries import See, observe
from kvmem.registry import Registry


@dataclass(frozen=True)
class Head:
    """What one KV head of a layer keeps: fewer entries than the memory has tokens."""

    keys_ND: torch.Tensor
    """(entries, head_dim), after RoPE."""
    values_ND: torch.Tensor
    """(entries, head_dim)."""
    bias_N: torch.Tensor | None = None
    """What is added to the score of each entry, (entries,); None: nothing."""

    def kept(self) -> dict[str, torch.Tensor]:
        """By the names under which a cache keeps it."""
        kept = {PACKED_KEYS: self.keys_ND, PACKED_VALUES: self.values_ND}
        return kept if self.bias_N is None else kept | {BIAS: self.bias_N[:, None].to(self.keys_ND.dtype)}


@dataclass(frozen=True)
class Repeat:
    """What follows a memory so that the model repeats it: a turn that asks for it, and the memory's text as the answer.

    Strategies look at the queries of these tokens to see which entries are needed.
    """

    prompt_ids: tuple[int, ...]
    text_ids: tuple[int, ...]


@dataclass(frozen=True)
class Memory:
    """What a strategy compacts: a memory as it was built, and the model that built it."""

    layers: Sequence[KV]
    """Keys (after RoPE) and values of each layer, (1, kv_heads, tokens, head_dim). They are not modified."""
    token_ids: tuple[int, ...]
    model: PreTrainedModel
    repeat: Repeat

    @classmethod
    def of(cls, item: KVCacheItem, model: PreTrainedModel, repeat: Repeat) -> Memory:
        """The memory of an item that is not compacted. Raises CompactionError for one that is."""
        return cls(dynamic_cache.layers_of(item.kv_cache), item.metadata.tokens.token_ids, model, repeat)

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    def observe(self, see: See) -> None:
        """Shows `see` what each layer computes while the model repeats the memory: one prefill of about its length.

        Raises CompactionError as `observed_queries.observe`.
        """
        observe(self.model, self.layers, self.repeat.prompt_ids, self.repeat.text_ids, see)


class CompactionStrategy(ABC):
    """Keeps fewer entries of a memory than it has tokens. A subclass is a dataclass; its fields are its knobs."""

    name: ClassVar[str]
    """The name in configurations, messages and rows."""

    @abstractmethod
    def compact(self, memory: Memory) -> list[list[Head]]:
        """What each layer's KV heads keep, at least one entry each. `memory` is not modified.

        Raises CompactionError if the strategy does not cover this memory or this model.
        """

    def knobs(self) -> dict[str, Any]:
        """The strategy's fields, as plain values."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return] # every strategy is a dataclass


STRATEGIES = Registry(CompactionStrategy, "kvmem.compaction", "compaction strategy")


def strategy(name: str) -> CompactionStrategy:
    """The strategy called `name`, with its default parameters. Case, underscores and hyphens do not matter.

    Raises ConfigError for an unknown name, with the nearest one and all choices.
    """
    return STRATEGIES.find(name)()
