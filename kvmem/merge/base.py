"""The interface of a merge strategy, and the token ids of a merge.

They are header + body 1 + separator + body 2 + …
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from transformers import DynamicCache, PreTrainedModel

from kvmem.cache import KVCacheItem, MemoryTokens
from kvmem.errors import MergeError
from kvmem.registry import Registry


class MergeStrategy(ABC):
    """Builds one cache from several items, for the token ids that `merged_tokens` returns."""

    name: ClassVar[str]
    """The name in configurations, messages and rows."""
    exact: ClassVar[bool]
    """Whether the cache equals a joint prefill of the merged ids."""

    @abstractmethod
    def merge(
        self, items: Sequence[KVCacheItem], separator_ids: tuple[int, ...], model: PreTrainedModel
    ) -> DynamicCache:
        """A cache of exactly `merged_tokens(items, separator_ids).token_ids`. The items are not modified.

        Raises MergeError if the strategy does not support these items or this model.
        """


def merged_tokens(items: Sequence[KVCacheItem], separator_ids: tuple[int, ...]) -> MemoryTokens:
    """The tokens of a merge of `items`: the header of the first item, then every body, with separators between them.

    Raises MergeError for an item of chat turns, because its body is not a text that another text can follow.
    """
    for item in items:
        if not isinstance(item.metadata.tokens.source, str):
            raise MergeError(
                f"Item {item.kv_cache_id} holds chat turns, and only memories of text can be merged. "
                "Use it alone, or extract its content as a text."
            )
    return joined_tokens([item.metadata.tokens for item in items], separator_ids)


def joined_tokens(parts: Sequence[MemoryTokens], separator_ids: tuple[int, ...]) -> MemoryTokens:
    """The tokens of a merge of several text memories, which need not have been built."""
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
    """The strategy called `name`, with its default parameters. Case, underscores and hyphens do not matter.

    Raises ConfigError for an unknown name, with the nearest one and all choices.
    """
    return STRATEGIES.find(name)()
