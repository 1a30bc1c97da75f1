"""The output is the same: a memory injected and the same memory sent as text, on five models and real text."""

from __future__ import annotations

import random

import pytest

from kvmem.engines.huggingface.backend import HFBackend
from tests.helpers.tiny import SHAPES, copy_of, greedy_by_transformers, last_logits, memory_on, pairs, same_bits

NEW_TOKENS = 32
LOGITS_TOLERANCE = 1e-4


def check_pairs(backend: HFBackend, text_query_pairs: list[tuple[str, str]]) -> None:
    memory = memory_on(backend)
    items = memory.extract([text for text, _ in text_query_pairs])
    memory.add(items)
    stored = [copy_of(item) for item in items]

    # The direct arm shares nothing with ours: transformers renders, tokenises, prefills and decodes.
    prompts, direct, bare = [], [], []
    for text, query in text_query_pairs:
        turns = [{"role": "system", "content": text}, {"role": "user", "content": query}]
        encoded = backend.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        prompts.append(tuple(encoded["input_ids"]))
        direct.append(greedy_by_transformers(backend, prompts[-1], NEW_TOKENS))
        bare.append(list(backend.generate(query, max_new_tokens=4).token_ids))

    shuffled = random.Random(1).sample(range(len(text_query_pairs)), len(text_query_pairs))
    for order in (range(len(text_query_pairs)), shuffled):
        for i in order:
            cache = memory.get_cache([items[i].kv_cache_id])
            prompt = backend.split(text_query_pairs[i][1], cache)
            assert prompt.ids == prompts[i]
            assert len(prompt.memory_ids) == items[i].metadata.token_count  # else nothing was injected
            logits_V, _ = backend.prefill(prompt, cache)
            assert (logits_V - last_logits(backend, prompt.ids)).abs().max() < LOGITS_TOLERANCE
            answer = backend.generate(text_query_pairs[i][1], memory.get_cache(items[i].kv_cache_id), NEW_TOKENS)
            assert list(answer.token_ids) == direct[i], f"pair {i}"
    assert all(same_bits(item, before) for item, before in zip(items, stored, strict=True))

    # The test has power only if an answer depends on its memory.
    changed = sum(answer[: len(without)] != without for answer, without in zip(direct, bare, strict=True))
    assert changed >= len(text_query_pairs) / 2


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_twenty_pairs_on_each_family(tiny, name):
    assert tiny(name).model_config.model_type == name
    check_pairs(tiny(name), pairs(20, characters=600))


def test_four_pairs_on_smollm2(smollm2):
    check_pairs(smollm2, pairs(4, characters=400))


def test_plain_template_gives_the_concatenation(qwen3_plain):
    memory = memory_on(qwen3_plain)
    for text, query in pairs(8, characters=400, seed=2):
        item = memory.extract(text)
        memory.add(item)
        ids = tuple(qwen3_plain.tokenizer(text + query).input_ids)
        answer = qwen3_plain.generate(query, memory.get_cache(item.kv_cache_id), NEW_TOKENS)
        assert answer.prompt_tokens == len(ids)
        assert answer.cached_tokens == item.metadata.token_count
        assert list(answer.token_ids) == greedy_by_transformers(qwen3_plain, ids, NEW_TOKENS)
