"""Items whose file did not say which tokens they hold (MemOS's pickles): told from the source text, or refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jinja2.exceptions import TemplateError

from kvmem.cache import KVCacheItem, MemoryTokens
from kvmem.errors import FingerprintError, PromptError
from kvmem.prompt.template import PromptTemplate

MEMOS_PREFACE = "Below is some information about the user.\n"
"""What MemOS (2.0) puts before a text in the system turn that it prefills, alone, through the model's chat template."""


def with_ids_from_text(item: KVCacheItem, template: PromptTemplate) -> KVCacheItem:
    """The item itself where its ids are known; else one with its source text's ids, if they are as many as the cache's.

    Tried are the text as `template` stores it, as MemOS prefills it, and bare. Raises FingerprintError where the ids
    can't be told: a cache of unknown tokens would answer another prompt.
    """
    if item.metadata.tokens.token_ids:
        return item
    held = item.kv_cache.get_seq_length()
    source = item.metadata.tokens.source
    if isinstance(source, str) and source.strip():
        ways: tuple[Callable[[str, PromptTemplate], MemoryTokens], ...] = (_as_stored_here, _as_memos_does, _bare)
        for way in ways:
            try:
                tokens = way(source, template)
            except (PromptError, TemplateError):  # a text, or turn, that this way does not cover: no cache is of it
                continue
            if len(tokens.token_ids) == held:
                return dataclasses.replace(item, metadata=item.metadata.model_copy(update={"tokens": tokens}))
    raise FingerprintError(
        f"Item {item.kv_cache_id} holds {held} tokens that its file does not name, and its source text does not give "
        "that many. Extract it again from the text."
    )


def _as_stored_here(source: str, template: PromptTemplate) -> MemoryTokens:
    return template.memory_tokens(source)


def _as_memos_does(source: str, template: PromptTemplate) -> MemoryTokens:
    """The preface is a part of the memory from here on, for a query's prompt must begin with it too."""
    if template.kind == "plain":
        raise PromptError("MemOS prefills through a chat template, whose tokens no plain prompt begins with.")
    content = MEMOS_PREFACE + source
    tokens = template.memory_tokens(content)
    system = [{"role": "system", "content": content}]
    text = template.tokenizer.apply_chat_template(system, tokenize=False, add_generation_prompt=False)
    ids = tuple(template.tokenizer(text).input_ids)
    body_end = min(tokens.body_end, len(ids))
    return tokens.model_copy(update={"token_ids": ids, "body_end": body_end, "rest_ids": ()})


def _bare(source: str, template: PromptTemplate) -> MemoryTokens:
    ids = PromptTemplate(template.tokenizer, "plain").bare(source).ids
    begins = ids[0] == template.tokenizer.bos_token_id
    return MemoryTokens(
        source=source, template=template.kind, token_ids=ids, header_tokens=int(begins), body_end=len(ids)
    )
