"""`plain` stores texts that have no white space: the cut is by tokens, and the prefix is verified at every query."""

from __future__ import annotations

import copy
import json

import pytest

from kvmem.prompt import PromptTemplate
from tests.helpers.tiny import greedy_by_transformers, memory_on, with_template

TEXTS = {
    "chinese": "巴黎是法国的首都。柏林是德国的首都。罗马是意大利的首都。",
    "japanese": "パリはフランスの首都です。ベルリンはドイツの首都です。",
    "thai": "ปารีสเป็นเมืองหลวงของฝรั่งเศส",
    "json": json.dumps({"capitals": {"France": "Paris", "Germany": "Berlin"}, "n": [1, 2]}, separators=(",", ":")),
    "url": "https://example.org/capitals/europe?country=france&city=paris#history",
    "base64": "UGFyaXMgaXMgdGhlIGNhcGl0YWwgb2YgRnJhbmNlLiBCZXJsaW4gaXM=",
    "emoji": "👩‍👩‍👧🇫🇷🗼🍷",
    "one word": "Paris",
    "one character": "é",
    "a text that ends in a URL": "The page on capitals is https://example.org/capitals/europe?country=france",
}
QUERIES = ("?", " Why?", "的首都", "ist", '"]}', "/index.html", "\u0301", "\n\nWhich one?")


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_is_stored_and_no_query_changes_the_ids(qwen3_plain, name):
    text, template = TEXTS[name], qwen3_plain.template
    tokens = template.memory_tokens(text)
    whole = tuple(qwen3_plain.tokenizer(text).input_ids)
    assert tokens.token_ids and tokens.token_ids + tokens.rest_ids == whole
    assert len(tokens.token_ids) >= len(whole) - 4
    for query in QUERIES:
        prompt = template.split(tokens, query)
        assert prompt.ids == tuple(qwen3_plain.tokenizer(text + query).input_ids)
        assert len(prompt.memory_ids) >= len(tokens.token_ids) - 3


@pytest.mark.parametrize("name", TEXTS)
def test_the_answer_is_that_of_the_whole_text(qwen3_plain, name):
    memory = memory_on(qwen3_plain)
    item = memory.extract(TEXTS[name])
    memory.add(item)
    for query in QUERIES:
        answer = qwen3_plain.generate(query, memory.get_cache(item.kv_cache_id), 8)
        ids = tuple(qwen3_plain.tokenizer(TEXTS[name] + query).input_ids)
        assert list(answer.token_ids) == greedy_by_transformers(qwen3_plain, ids, 8)


def test_a_sliding_window_still_has_its_hit(sliding):
    """Tokens that left the window can't be restored, so a cut behind what queries change would never be a hit."""
    backend = with_template(sliding, "plain")
    memory = memory_on(backend)
    item = memory.extract(TEXTS["chinese"])
    memory.add(item)
    assert item.metadata.token_count > 24
    for query in ("的人口是多少？", " Why?"):
        answer = backend.generate(query, memory.get_cache(item.kv_cache_id), 8)
        ids = tuple(backend.tokenizer(TEXTS["chinese"] + query).input_ids)
        assert list(answer.token_ids) == greedy_by_transformers(backend, ids, 8)
        assert answer.cached_tokens == item.metadata.token_count


def test_merges_hold_every_token_of_such_texts(qwen3_plain):
    memory = memory_on(qwen3_plain, separator="\n")
    items = memory.extract([TEXTS["chinese"], TEXTS["json"]])
    memory.add(items)
    view = memory.get_cache([item.kv_cache_id for item in items])
    prompt = qwen3_plain.split(" Why?", view)
    assert qwen3_plain.tokenizer.decode(prompt.ids) == f"{TEXTS['chinese']}\n{TEXTS['json']} Why?"


def test_chat_templates_without_a_barrier_store_them_too(qwen3):
    tokenizer = copy.deepcopy(qwen3.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    template = PromptTemplate(tokenizer, "chat")
    for text in TEXTS.values():
        tokens = template.memory_tokens(text)
        assert tokens.body_ids
        for query in QUERIES:
            prompt = template.split(tokens, query)
            assert prompt.ids == tuple(tokenizer(text + query, add_special_tokens=False).input_ids)
