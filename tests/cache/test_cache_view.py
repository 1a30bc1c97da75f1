"""A view can be used in any way: the stored memory stays bit-identical, and later answers equal the first one."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache

from kvmem.cache import dynamic_cache
from kvmem.cache.dynamic_cache import CacheView, layers_of
from kvmem.cache.layers import INITIAL_HEADROOM_TOKENS
from kvmem.engines.generation import Sampling
from kvmem.models.forward import prefill
from tests.helpers.tiny import copy_of, greedy_by_transformers, memory_on, pairs, same_bits

TEXT, QUERY = pairs(1, characters=500, seed=7)[0]


@pytest.fixture
def stored_item(qwen3):
    """A memory with one item, and the item."""
    memory = memory_on(qwen3)
    item = memory.extract(TEXT)
    memory.add(item)
    return memory, item


def test_100_views_from_4_threads(stored_item, qwen3):
    memory, item = stored_item
    before = copy_of(item)
    first = qwen3.generate(QUERY, memory.get_cache(item.kv_cache_id), 12)
    assert first.cached_tokens == item.metadata.token_count

    def ask(_: int) -> tuple[int, ...]:
        return qwen3.generate(QUERY, memory.get_cache([item.kv_cache_id]), 12).token_ids

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(100)))
    assert answers == [first.token_ids] * 100
    assert same_bits(item, before)


def test_20_views_from_4_threads_smollm2(smollm2):
    memory = memory_on(smollm2)
    item = memory.extract("Kiwis are flightless birds of New Zealand. They lay the largest eggs for their size.")
    memory.add(item)
    before = copy_of(item)
    first = smollm2.generate("Can kiwis fly?", memory.get_cache(item.kv_cache_id), 2)
    with ThreadPoolExecutor(4) as pool:
        answers = list(
            pool.map(
                lambda _: smollm2.generate("Can kiwis fly?", memory.get_cache(item.kv_cache_id), 2).token_ids, range(20)
            )
        )
    assert answers == [first.token_ids] * 20
    assert same_bits(item, before)


def test_a_view_shares_the_stored_tensors(stored_item):
    memory, item = stored_item
    one, two = memory.get_cache(item.kv_cache_id), memory.get_cache(item.kv_cache_id)
    assert one is not two and one is not item.kv_cache
    assert isinstance(one, CacheView) and one.get_seq_length() == item.metadata.token_count
    for (cache_view, _), (again, _), (stored, _) in zip(
        layers_of(one), layers_of(two), layers_of(item.kv_cache), strict=True
    ):
        assert cache_view.data_ptr() == again.data_ptr() == stored.data_ptr()


def test_a_view_works_in_transformers_generate(family):
    memory = memory_on(family)
    item = memory.extract(TEXT)
    memory.add(item)
    before = copy_of(item)
    ids = family.split(QUERY, memory.get_cache(item.kv_cache_id)).ids
    direct = greedy_by_transformers(family, ids, 32)
    for _ in range(2):
        assert greedy_by_transformers(family, ids, 32, memory.get_cache(item.kv_cache_id)) == direct
    assert same_bits(item, before)


def test_a_view_works_in_a_beam_search(stored_item, qwen3):
    memory, item = stored_item
    before = copy_of(item)
    cache = memory.get_cache(item.kv_cache_id)
    ids = qwen3.split(QUERY, cache).ids
    cache.batch_repeat_interleave(3)
    beams = greedy_by_transformers(qwen3, ids, 10, cache, num_beams=3)
    assert beams == greedy_by_transformers(qwen3, ids, 10, num_beams=3)
    assert same_bits(item, before)
    # Each reorder replaces the layer's tensors; doubling the free space each time would make it 2^10 × 64 tokens.
    assert all(layer.headroom == INITIAL_HEADROOM_TOKENS for layer in cache.layers)


def test_a_view_grows_past_its_headroom(stored_item, qwen3):
    """After three doublings, the tensors equal those of transformers' own cache, which grows by concatenation."""
    memory, item = stored_item
    before = copy_of(item)
    cache_view = memory.get_cache(item.kv_cache_id)
    plain = dynamic_cache.from_layers(copy_of(item), qwen3.model_config)
    steps = [3, *[1] * 70, 40, *[1] * 90, 300, *[1] * 10]
    tokens = iter(range(1000, 1000 + sum(steps)))
    buffers = set()
    for step in steps:
        ids = [next(tokens) for _ in range(step)]
        ours, theirs = prefill(qwen3.model, ids, cache_view), prefill(qwen3.model, ids, plain)
        buffers.add(cache_view.layers[0].buffers[0].data_ptr())
        assert cache_view.get_seq_length() == plain.get_seq_length()
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-4)
    for (keys, values), (plain_keys, plain_values) in zip(layers_of(cache_view), layers_of(plain), strict=True):
        assert torch.allclose(keys, plain_keys, rtol=0, atol=1e-5) and torch.allclose(
            values, plain_values, rtol=0, atol=1e-5
        )
    assert 3 <= len(buffers) <= 5  # amortised: not a new buffer at each of the 173 steps
    assert same_bits(item, before)


@pytest.mark.parametrize("when", ["at once", "after growing"])
def test_a_cropped_view_can_be_continued(stored_item, qwen3, when):
    memory, item = stored_item
    before = copy_of(item)
    cache_view = memory.get_cache(item.kv_cache_id)
    plain = dynamic_cache.from_layers(copy_of(item), qwen3.model_config)
    for cache in (cache_view, plain):
        if when == "after growing":
            prefill(qwen3.model, [5, 6, 7, 8], cache)
        cache.crop(-6)  # transformers' own
    assert cache_view.get_seq_length() == plain.get_seq_length() < item.metadata.token_count
    ours, theirs = prefill(qwen3.model, [9, 10, 11], cache_view), prefill(qwen3.model, [9, 10, 11], plain)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4)
    assert same_bits(item, before)


def test_one_view_answers_two_queries(stored_item, qwen3):
    """A view that has grown by an answer is cropped to its common prefix with the next prompt."""
    memory, item = stored_item
    before = copy_of(item)
    cache = memory.get_cache(item.kv_cache_id)
    first = qwen3.generate(QUERY, cache, 80)
    assert cache.get_seq_length() > item.metadata.token_count
    other = qwen3.generate("And then?", cache, 16)
    assert other == qwen3.generate("And then?", memory.get_cache(item.kv_cache_id), 16)
    assert qwen3.generate(QUERY, cache, 80) == first
    assert same_bits(item, before)


def test_a_view_that_its_user_cropped_reports_what_was_reused(stored_item, qwen3):
    memory, item = stored_item
    cache = memory.get_cache(item.kv_cache_id)
    cache.crop(-10)
    answer = qwen3.generate(QUERY, cache, 16)
    assert answer.cached_tokens == item.metadata.token_count - 10
    assert answer.token_ids == qwen3.generate(QUERY, memory.get_cache(item.kv_cache_id), 16).token_ids


def test_a_view_made_in_inference_mode_is_used_outside_of_it(stored_item, qwen3):
    memory, item = stored_item
    before = copy_of(item)
    cache = memory.get_cache(item.kv_cache_id)
    qwen3.generate(QUERY, cache, 4)  # its buffer is an inference tensor, which must not be written outside
    assert cache.layers[0].buffers[0].is_inference()
    with torch.no_grad():
        outside = qwen3.model(torch.tensor([[42]]), past_key_values=cache).logits[0, -1]
    plain = dynamic_cache.from_layers(
        [(k[..., :-1, :], v[..., :-1, :]) for k, v in layers_of(cache)], qwen3.model_config
    )
    assert torch.allclose(outside, prefill(qwen3.model, [42], plain), rtol=0, atol=1e-4)
    assert same_bits(item, before)


@pytest.mark.parametrize("use", ["reset", "copied", "repeated", "selected", "reordered"])
def test_a_view_works_with_the_methods_of_transformers(stored_item, qwen3, use):
    memory, item = stored_item
    before = copy_of(item)
    cache = memory.get_cache(item.kv_cache_id)
    if use == "reset":
        cache.reset()
        assert cache.get_seq_length() == 0
    elif use == "copied":
        cache = copy.deepcopy(cache)
    elif use == "repeated":
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1]))
    elif use == "selected":
        cache.batch_select_indices(torch.tensor([0]))
    else:
        cache.reorder_cache(torch.tensor([0]))
    with torch.no_grad():
        for _ in range(2):
            qwen3.model(torch.tensor([[3, 4]]), past_key_values=cache)
    for keys, values in layers_of(cache):  # what a user can do to a view that has grown
        keys.zero_()
        values.zero_()
    assert same_bits(item, before)


def test_a_view_of_a_merge_leaves_every_item_unchanged(qwen3):
    for merge in ("Reprefill", "RopeShift", "NaiveConcat"):
        memory = memory_on(qwen3, merge=merge)
        items = memory.extract([text for text, _ in pairs(3, characters=200, seed=3)])
        memory.add(items)
        before = [copy_of(item) for item in items]
        answers = {
            qwen3.generate(QUERY, memory.get_cache([item.kv_cache_id for item in items]), 70).token_ids
            for _ in range(2)
        }
        assert len(answers) == 1
        assert all(same_bits(item, old) for item, old in zip(items, before, strict=True))


def test_views_are_sampled_from_4_threads_with_a_seed_each(stored_item, qwen3):
    memory, item = stored_item

    def ask(seed: int) -> tuple[int, ...]:
        sampling = Sampling(temperature=1.0, seed=seed)
        return qwen3.generate(QUERY, memory.get_cache(item.kv_cache_id), 8, sampling).token_ids

    seeds = list(range(6)) * 4
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, seeds)) == [ask(seed) for seed in seeds]


def test_a_cache_built_from_layers_has_their_length(stored_item, qwen3):
    """MemOS issue 2313: a cache built without the layers' flags has length 0, and the model silently ignores it."""
    _, item = stored_item
    rebuilt = dynamic_cache.from_layers(copy_of(item), qwen3.model_config)
    assert type(rebuilt) is DynamicCache and rebuilt.get_seq_length() == item.metadata.token_count
    assert all(layer.is_initialized and layer.dtype == torch.float32 for layer in rebuilt.layers)
    assert dynamic_cache.nbytes(rebuilt) == item.metadata.kv_bytes
