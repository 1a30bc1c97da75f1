"""A compacted memory computes what the whole memory does with the dropped entries hidden, and its position goes on."""

from __future__ import annotations

import threading

import pytest
import torch

from kvmem.cache import PACKED_KEYS, PACKED_VALUES, dynamic_cache
from kvmem.compaction import STRATEGIES, Memory, TokenChoice, compact
from kvmem.compaction.knorm import Knorm
from kvmem.compaction.random_choice import RandomChoice
from kvmem.compaction.streaming_llm import StreamingLLM
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import CompactionError
from tests.compaction.reference import logits_with
from tests.compaction.strategies import Doubled, Uneven
from tests.helpers.architectures import copy_of_contents, has_contents
from tests.helpers.tiny import copy_of, greedy_by_transformers, memory_on, pairs, same_bits

CHOICES = {name: cls for name, cls in STRATEGIES.classes().items() if issubclass(cls, TokenChoice)}
((TEXT, QUERY),) = pairs(1, characters=400, seed=7)
TOLERANCE = 2e-5
"""Logits of these models are about 1; fp32."""


def off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max())


def query_ids(backend: HFBackend, item):
    return backend.template.split(item.metadata.tokens, QUERY).query_ids


@pytest.fixture(scope="module")
def item(qwen3):
    return memory_on(qwen3).extract(TEXT)


def memory_of(backend: HFBackend, item) -> Memory:
    return Memory.of(item, backend.model, backend.repeat_of(item.metadata.tokens))


def test_every_strategy_of_the_package_is_found_by_name():
    assert {"knorm", "keydiff", "streamingllm", "randomchoice"} <= set(STRATEGIES.classes())


@pytest.mark.parametrize("name", sorted(CHOICES))
def test_a_ratio_of_1_is_the_memory_bit_by_bit(qwen3, item, name):
    whole = qwen3.compact(item, CHOICES[name](ratio=1.0))
    for (keys, values), kept in zip(
        dynamic_cache.layers_of(item.kv_cache), dynamic_cache.contents_of(whole.kv_cache), strict=True
    ):
        assert torch.equal(kept[PACKED_KEYS].view_as(keys), keys)
        assert torch.equal(kept[PACKED_VALUES].view_as(values), values)
    ids = query_ids(qwen3, item)
    assert torch.equal(logits_with(qwen3, whole, ids), logits_with(qwen3, item, ids))
    assert whole.metadata.kv_bytes == item.metadata.kv_bytes


@pytest.mark.parametrize("strategy", [*(cls(ratio=0.2) for cls in CHOICES.values()), Uneven()], ids=lambda s: s.name)
def test_a_choice_is_full_attention_with_the_dropped_entries_hidden(family: HFBackend, strategy):
    item = memory_on(family).extract(TEXT)
    compacted = family.compact(item, strategy)
    chosen = strategy.chosen(memory_of(family, item))
    assert compacted.metadata.compaction.entries == tuple(tuple(map(len, heads)) for heads in chosen)
    ids = query_ids(family, item)
    expected = logits_with(family, item, ids, chosen)
    assert off(logits_with(family, compacted, ids), expected) < TOLERANCE
    assert off(logits_with(family, item, ids), expected) > 100 * TOLERANCE  # what was dropped matters


def test_entries_in_another_order_and_twice_at_half_weight_are_the_memory(family: HFBackend):
    item = memory_on(family).extract(TEXT)
    ids = query_ids(family, item)
    same, heavier = (family.compact(item, Doubled(*bias)) for bias in ((), (0.0,)))
    assert off(logits_with(family, same, ids), logits_with(family, item, ids)) < TOLERANCE
    assert off(logits_with(family, heavier, ids), logits_with(family, item, ids)) > 100 * TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masks_reach_every_attention_that_takes_them(attention):
    backend = HFBackend.open(HFBackend.config_class("random:tiny", attn_implementation=attention, device="cpu"))
    item = memory_on(backend).extract(TEXT)
    ids = query_ids(backend, item)
    same = backend.compact(item, Doubled())
    assert off(logits_with(backend, same, ids), logits_with(backend, item, ids)) < TOLERANCE


def test_the_choices_follow_their_definitions(qwen3, item):
    memory = memory_of(qwen3, item)
    tokens = memory.tokens
    keys = memory.layers[1][0]
    shortest = Knorm(ratio=0.2).chosen(memory)[1][0]
    others = sorted(set(range(tokens)) - set(shortest.tolist()))
    norms = keys[0, 0].norm(dim=-1)
    assert norms[shortest].max() <= norms[others].min()
    ends = StreamingLLM(ratio=10 / tokens, sinks=4).chosen(memory)[0][0]
    assert ends.tolist() == [0, 1, 2, 3, *range(tokens - 6, tokens)]
    assert StreamingLLM(ratio=3 / tokens, sinks=4).chosen(memory)[0][0].max() < 4
    first, again, other = (RandomChoice(ratio=0.2, seed=seed).chosen(memory)[0][0].tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_an_answer_says_that_it_is_lossy_and_repeats(qwen3):
    memory = memory_on(qwen3)
    item = memory.extract(TEXT, compaction=Uneven())
    memory.add(item)
    before = copy_of_contents(item)
    view = memory.get_cache(item.kv_cache_id)
    answers = [qwen3.generate(QUERY, view, 8) for _ in range(2)]  # the second goes back to the end of the memory
    answers.append(qwen3.generate(QUERY, memory.get_cache(item.kv_cache_id), 8))
    assert answers[0] == answers[1] == answers[2]
    assert answers[0].lossy == item.metadata.lossy == view.lossy
    assert item.metadata.lossy.startswith("compacted by Uneven to ")
    assert answers[0].cached_tokens == item.metadata.token_count
    assert has_contents(item, before)


def test_a_compaction_leaves_the_item_as_it_was(qwen3, item):
    before = copy_of(item)
    compacted = qwen3.compact(item, Knorm(ratio=0.5))
    qwen3.generate(QUERY, qwen3.view([compacted], None, ""), 4)
    assert same_bits(item, before)
    assert compacted.kv_cache_id != item.kv_cache_id
    assert compacted.metadata.tokens == item.metadata.tokens
    assert compacted.metadata.kv_bytes == dynamic_cache.nbytes(compacted.kv_cache) < 0.6 * item.metadata.kv_bytes


def test_a_query_that_changes_the_memorys_last_tokens_computes_the_text_again(qwen3_plain):
    memory = memory_on(qwen3_plain)
    item = memory.extract("The capital is in the south. It has a harbour", compaction="Knorm")
    memory.add(item)
    view = memory.get_cache(item.kv_cache_id)
    prompt = qwen3_plain.template.split(item.metadata.tokens, "ing of boats?")
    view.tokens = item.metadata.tokens.model_copy(update={"token_ids": (*item.metadata.tokens.token_ids[:-1], 5)})
    answer = qwen3_plain.generate("ing of boats?", view, 6)
    assert answer.cached_tokens == 0 and "compacted" in answer.note and answer.lossy == ""
    assert list(answer.token_ids) == greedy_by_transformers(qwen3_plain, prompt.ids, 6)


def test_transformers_own_generate_continues_a_view_or_is_refused(qwen3, item):
    even = qwen3.compact(item, StreamingLLM(ratio=0.3))
    prompt = qwen3.template.split(item.metadata.tokens, QUERY)
    view = qwen3.view([even], None, "")
    ours = qwen3.generate(QUERY, qwen3.view([even], None, ""), 6).token_ids
    assert greedy_by_transformers(qwen3, prompt.ids, 6, view) == list(ours)
    uneven = qwen3.view([qwen3.compact(item, Uneven())], None, "")
    with pytest.raises(CompactionError, match="needs a mask in every layer"):
        greedy_by_transformers(qwen3, prompt.ids, 6, uneven)


def test_answers_with_and_without_masks_at_the_same_time(qwen3, item):
    kinds = [item, qwen3.compact(item, Uneven()), qwen3.compact(item, Knorm()), qwen3.compact(item, Doubled())]
    expected = [qwen3.generate(QUERY, qwen3.view([each], None, ""), 12) for each in kinds]
    found: dict[int, list] = {i: [] for i in range(len(kinds))}

    def answer(i: int) -> None:
        for _ in range(4):
            found[i].append(qwen3.generate(QUERY, qwen3.view([kinds[i]], None, ""), 12))

    threads = [threading.Thread(target=answer, args=(i,)) for i in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(answers == [expected[i]] * 4 for i, answers in found.items())


def test_compact_is_a_function_of_the_library(qwen3, item):
    repeat = qwen3.repeat_of(item.metadata.tokens)
    by_function = compact(item, Knorm(ratio=0.5), qwen3.model, repeat)
    assert has_contents(by_function, copy_of_contents(qwen3.compact(item, Knorm(ratio=0.5))))
