"""The engine's own work: bucket edges, switching memories, answers that take turns."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kvmem.cache.dynamic_cache import empty_view, layers_of
from tests.graph.conftest import prompt_of, stored
from tests.helpers.tiny import copy_of, pairs, same_bits

TEXTS = [text for text, _ in pairs(4, characters=900, seed=11)]
QUERY = "Which names are bound here, and by whom?"


def same_answer(fast, memory, item, eager, query=QUERY, tokens=8):
    """The fast engine's logits behind a memory, step by step along Hugging Face's answer, against its own."""
    prompt = fast.split(query, memory.get_cache(item.kv_cache_id))
    return along(fast, eager, prompt, memory.get_cache(item.kv_cache_id), tokens)


def along(fast, eager, prompt, cache, tokens):
    """Largest difference of the logits of both, fed the same tokens."""
    whole = type(prompt)((), prompt.ids)
    theirs_V, grown = eager.prefill(whole)
    ours_V, answer = fast.prefill(prompt, cache)
    worst = 0.0
    for _ in range(tokens):
        worst = max(worst, float((theirs_V.float() - ours_V.float()).abs().max()))
        token = int(theirs_V.argmax())
        theirs_V, ours_V = eager.decode_one_token(token, grown), fast.decode_one_token(token, answer)
    return worst


@pytest.mark.parametrize("new", [1, 2, 8, 63, 64, 65, 127, 128, 129, 160, 167, 168, 169])
def test_lengths_about_a_buckets_edge(open_engine, eager, setting, new):
    fast = open_engine()
    prompt = prompt_of(0, new)
    assert along(fast, eager, prompt, None, 3) < setting.tolerance


@pytest.mark.parametrize("new", [1, 7, 8, 9, 64, 65, 167, 168])
def test_lengths_behind_a_memory(open_engine, eager, setting, new):
    fast = open_engine()
    memory, item = stored(fast, TEXTS[0])
    held = item.metadata.tokens.token_ids
    prompt = type(prompt_of(0, 1))(held, prompt_of(0, new).query_ids)
    cache = memory.get_cache(item.kv_cache_id)
    before = copy_of(item) if setting.dtype == torch.float32 else None
    for _ in range(2):  # the second finds the memory in place
        assert along(fast, eager, prompt, cache, 3) < setting.tolerance
    assert before is None or same_bits(item, before)


def test_a_view_without_tokens_is_a_prompt_without_memory(open_engine, eager, setting):
    """MemScheduler answers with one while a memory's KV is not built; a stored memory may lie in a buffer already."""
    fast = open_engine()
    memory, item = stored(fast, TEXTS[0])
    view = empty_view(item.metadata.tokens, fast.model_config)
    for _ in range(2):
        prompt = fast.split(QUERY, view)
        assert prompt.memory_ids == () and along(fast, eager, prompt, view, 3) < setting.tolerance
        first = fast.generate(QUERY, view, 1)
        assert fast.first_token(prompt, view).id in (*first.token_ids, *fast.end_tokens) and first.cached_tokens == 0
        memory.get_cache(item.kv_cache_id)


def test_one_graph_serves_every_memory(open_engine, eager, setting):
    fast = open_engine()
    memory, first = stored(fast, TEXTS[0])
    second = memory.extract(TEXTS[1][:200])
    memory.add(second)
    for item in (first, second, first, second):
        assert same_answer(fast, memory, item, eager) < setting.tolerance


@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_memories_in_turn(open_engine, eager, setting, buffers):
    fast = open_engine(buffers=buffers)
    memory, first = stored(fast, TEXTS[0])
    items = [first, *memory.extract(TEXTS[1:])]
    memory.add(items[1:])
    for i in (0, 1, 0, 2, 3, 3, 1, 0, 2):
        assert same_answer(fast, memory, items[i], eager, tokens=3) < setting.tolerance
    assert len(fast.engine.slots) <= buffers


def test_a_memory_in_place_is_not_copied_again(open_engine):
    fast = open_engine()
    memory, item = stored(fast, TEXTS[0])
    length = item.metadata.token_count
    buffer = fast.engine.slot_for(item.kv_cache).buffer
    assert buffer.place(item.kv_cache, length) == length
    assert buffer.place(item.kv_cache, length) == 0
    buffer.written_from(length - 5)
    assert buffer.place(item.kv_cache, length) == 5
    other = memory.extract(TEXTS[1])
    assert buffer.place(other.kv_cache, 10) == 10


def test_a_shortened_prefix_leaves_the_memory_usable(open_engine, eager, setting):
    """A query that breaks the prefix overwrites the memory's last rows in the buffer: they are placed again."""
    fast = open_engine(buffers=1)
    memory, item = stored(fast, TEXTS[0])
    ids = item.metadata.tokens.token_ids
    shortened = type(prompt_of(0, 1))(ids[:-6], prompt_of(0, 20).query_ids)
    assert along(fast, eager, shortened, memory.get_cache(item.kv_cache_id), 2) < setting.tolerance
    assert same_answer(fast, memory, item, eager) < setting.tolerance


def test_answers_take_turns_in_one_buffer(open_engine):
    """Streams advanced token by token in turn: the rows of one are saved when another takes the buffer."""
    fast = open_engine(buffers=1)
    memory, item = stored(fast, TEXTS[0])
    other = memory.extract(TEXTS[1])
    memory.add(other)
    requests = [(QUERY, item), ("Why?", item), (QUERY, other), ("Name one exception.", None)]

    def view(of):
        return None if of is None else memory.get_cache(of.kv_cache_id)

    alone = [fast.generate(query, view(of), 12).token_ids for query, of in requests]
    streams = [fast.stream(query, view(of), 12) for query, of in requests]
    together: list[list[int]] = [[] for _ in requests]
    for _ in range(12):
        for answer, stream in zip(together, streams, strict=True):
            answer += [token.id for token in [next(stream, None)] if token is not None]
    assert [tuple(answer) for answer in together] == alone


def test_from_four_threads(open_engine):
    fast = open_engine()
    memory, item = stored(fast, TEXTS[0])
    others = memory.extract(TEXTS[1:3])
    memory.add(others)
    items = [item, *others]
    alone = [fast.generate(QUERY, memory.get_cache(of.kv_cache_id), 6) for of in items]
    with ThreadPoolExecutor(4) as pool:
        answers = list(
            pool.map(lambda i: fast.generate(QUERY, memory.get_cache(items[i % 3].kv_cache_id), 6), range(24))
        )
    assert answers == [alone[i % 3] for i in range(24)]


def test_a_dropped_answer_frees_its_buffer_and_a_deleted_memory_too(open_engine):
    fast = open_engine(buffers=2)
    memory, item = stored(fast, TEXTS[0])
    _, answer = fast.prefill(fast.split(QUERY, memory.get_cache(item.kv_cache_id)), memory.get_cache(item.kv_cache_id))
    assert [slot.sequence for slot in fast.engine.slots].count(answer) == 1
    del answer
    assert all(slot.sequence is None for slot in fast.engine.slots)
    memory.delete_all()
    del item
    gc.collect()
    assert all(slot.buffer.memory is None or slot.buffer.memory() is None for slot in fast.engine.slots)


def test_a_build_that_pauses_is_the_same_build(open_engine):
    """Layer by layer with a buffer of its own, while a request uses the engine between two layers."""
    fast = open_engine(buffers=1)
    before = fast.generate(QUERY, None, 6)
    plain = fast.build(TEXTS[0])
    tolerance = 0.0 if fast.device.type == "cpu" else 0.05
    between: list[tuple[int, ...]] = []
    paused = fast.build(TEXTS[0], between_layers=lambda: between.append(fast.generate(QUERY, None, 6).token_ids))
    assert between == [before.token_ids] * fast.model_config.num_hidden_layers
    for one, other in zip(layers_of(paused.kv_cache), layers_of(plain.kv_cache), strict=True):
        for paused_BKTD, plain_BKTD in zip(one, other, strict=True):
            torch.testing.assert_close(paused_BKTD, plain_BKTD, rtol=0.0, atol=tolerance)
