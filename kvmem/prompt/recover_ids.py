"""Recovers the token ids of an item whose file does not state them (MemOS's pickles) from its source text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jinja2.exceptions import TemplateError

from kvmem.cache import KVCacheItem, MemoryTokens
from kvmem.errors import FingerprintError, PromptError
from kvmem.prompt.template import PromptTemplate

MEMOS_PREFACE = "Below is some information about the user.\n"
"""MemOS (2.0) prefills a system turn of this preface and the text, rendered by the model's chat template."""


def with_ids_from_text(item: KVCacheItem, template: PromptTemplate) -> KVCacheItem:
    """The item itself if its ids are known; else a copy with the ids of its source text.

    Tries the text as `template` renders it, as MemOS prefills it, and as plain text, and takes the first that has as
    many tokens as the cache. Raises FingerprintError if none has: a cache of unknown tokens answers another prompt.
    """
    if item.metadata.tokens.token_ids:
        return item
    cached_tokens = item.kv_cache.get_seq_length()
    source = item.metadata.tokens.source
    if isinstance(source, str) and source.strip():
        renderings: tuple[Callable[[str, PromptTemplate], MemoryTokens], ...] = (_from_template, _from_memos, _plain)
        for render in renderings:
            try:
                tokens = render(source, template)
            except (PromptError, TemplateError):  # this rendering can't produce the text, so the cache is not from it
                continue
            if len(tokens.token_ids) == cached_tokens:
                return dataclasses.replace(item, metadata=item.metadata.model_copy(update={"tokens": tokens}))
    raise FingerprintError(
        f"Item {item.kv_cache_id} holds {cached_tokens} tokens that its file does not state, and its source text does "
        "not give that many. Extract it again from the text."
    )


def _from_template(source: str, template: PromptTemplate) -> MemoryTokens:
    return template.memory_tokens(source)


def _from_memos(source: str, template: PromptTemplate) -> MemoryTokens:
    """The preface becomes part of the memory, because the prompt of a query must begin with it too."""
    if template.kind == "plain":
        raise PromptError("MemOS renders a chat template, and no plain prompt begins with its tokens.")
    content = MEMOS_PREFACE + source
    tokens = template.memory_tokens(content)
    system = [{"role": "system", "content": content}]
    text = template.tokenizer.apply_chat_template(system, tokenize=False, add_generation_prompt=False)
    ids = tuple(template.tokenizer(text).input_ids)
    body_end = min(tokens.body_end, len(ids))
    return tokens.model_copy(update={"token_ids": ids, "body_end": body_end, "rest_ids": ()})


def _plain(source: str, template: PromptTemplate) -> MemoryTokens:
    ids = PromptTemplate(template.tokenizer, "plain").bare(source).ids
    has_bos = ids[0] == template.tokenizer.bos_token_id
    return MemoryTokens(
        source=source, template=template.kind, token_ids=ids, header_tokens=int(has_bos), body_end=len(ids)
    )
