"""Items whose file did not say which tokens they hold (MemOS's pickles): told from the source text, or refused."""

from __future__ import annotations

import dataclasses

from kvmem.errors import FingerprintError
from kvmem.items import KVCacheItem, MemoryTokens
from kvmem.prompt import PromptTemplate


def with_ids_from_text(item: KVCacheItem, template: PromptTemplate) -> KVCacheItem:
    """The item itself where its ids are known; else one with its source text's ids, if they are as many as the cache's.

    Raises FingerprintError where they can't be told: a cache of unknown tokens would answer another prompt.
    """
    tokens = item.metadata.tokens
    if tokens.token_ids:
        return item
    held = item.kv_cache.get_seq_length()
    source = tokens.source
    if isinstance(source, str) and source.strip():
        whole = PromptTemplate(template.tokenizer, "plain").memory_tokens(source)
        told = [
            dataclasses.replace(item, metadata=item.metadata.model_copy(update={"tokens": candidate}))
            for candidate in (
                template.memory_tokens(source),
                MemoryTokens(
                    source=source,
                    template=template.kind,
                    token_ids=whole.token_ids + whole.rest_ids,
                    header_tokens=whole.header_tokens,
                    body_end=whole.body_end,
                ),
            )
            if len(candidate.token_ids) == held
        ]
        if told:
            return told[0]
    raise FingerprintError(
        f"Item {item.kv_cache_id} holds {held} tokens that its file does not name, and its source text does not give "
        "that many. Extract it again from the text."
    )
