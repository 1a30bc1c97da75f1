"""One merge strategy, one file. Several memories become one cache for header + body 1 + separator + body 2 + …"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from transformers import DynamicCache, PreTrainedModel

from kvmem.cache import KVCacheItem, MemoryTokens
from kvmem.errors import MergeError
from kvmem.registry import Registry


class MergeStrategy(ABC):
    """Builds the cache for the ids that `merged_tokens` names. `exact`: it equals a joint prefill of those ids."""

    name: ClassVar[str]
    exact: ClassVar[bool]

    @abstractmethod
    def merge(
        self, items: Sequence[KVCacheItem], separator_ids: tuple[int, ...], model: PreTrainedModel
    ) -> DynamicCache:
        """A cache of exactly `merged_tokens(items, separator_ids).token_ids`; the items stay as they are."""


def merged_tokens(items: Sequence[KVCacheItem], separator_ids: tuple[int, ...]) -> MemoryTokens:
    """What a merge of `items` holds: the first one's header, then every body, with separators between.

    Raises MergeError for an item of chat turns: a dialogue's body holds turns, not a text that another can follow.
    """
    for item in items:
        if not isinstance(item.metadata.tokens.source, str):
            raise MergeError(
                f"Item {item.kv_cache_id} holds chat turns, and only memories of text can be merged. "
                "Use it alone, or extract its content as a text."
            )
    return joined_tokens([item.metadata.tokens for item in items], separator_ids)


def joined_tokens(parts: Sequence[MemoryTokens], separator_ids: tuple[int, ...]) -> MemoryTokens:
    """The tokens of several text memories, one behind the other: a merge's, whether or not any of them is built."""
    lead: tuple[int, ...] = ()
    for part in parts[:-1]:
        lead += part.body_ids + part.rest_ids + separator_ids
    first, last = parts[0], parts[-1]
    ids = first.header_ids + lead + last.body_ids
    return MemoryTokens(
        source=last.source,
        template=last.template,
        token_ids=ids,
        header_tokens=first.header_tokens,
        body_end=len(ids),
        rest_ids=last.rest_ids,
        lead_ids=lead,
    )


STRATEGIES = Registry(MergeStrategy, "kvmem.merge", "merge strategy")


def strategy(name: str) -> MergeStrategy:
    """The strategy called `name` (case and underscores do not matter), with its default knobs."""
    return STRATEGIES.find(name)()
