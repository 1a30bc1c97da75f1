"""What users do to caches that are shared: two threads in one view, a stored cache given to a model, and `reset`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kvmem.errors import CacheInUseError, StoredCacheError
from tests.helpers.tiny import copy_of, memory_on, pairs, same_bits

TEXT, QUERY = pairs(1, characters=500, seed=7)[0]


@pytest.fixture
def stored_item(qwen3):
    """A memory with one item, and the item."""
    memory = memory_on(qwen3)
    item = memory.extract(TEXT)
    memory.add(item)
    return memory, item


def test_one_view_in_four_threads_is_right_or_refused(stored_item, qwen3):
    memory, item = stored_item
    expected = qwen3.generate(QUERY, memory.get_cache(item.kv_cache_id), 24)
    view = memory.get_cache(item.kv_cache_id)

    def answer(_: int) -> object:
        try:
            return qwen3.generate(QUERY, view, 24)
        except CacheInUseError as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(answer, range(60)))
    refused = [result for result in results if isinstance(result, CacheInUseError)]
    assert refused and len(refused) < len(results)
    assert all(result == expected for result in results if not isinstance(result, CacheInUseError))
    assert qwen3.generate(QUERY, view, 24) == expected


def test_a_view_belongs_to_a_stream_until_it_is_finished_or_dropped(stored_item, qwen3):
    memory, item = stored_item
    view = memory.get_cache(item.kv_cache_id)
    stream = qwen3.stream(QUERY, view, 8)
    next(stream)
    with pytest.raises(CacheInUseError, match="get_cache for each"):
        qwen3.generate(QUERY, view, 8)
    stream.close()
    assert qwen3.generate(QUERY, view, 8) == qwen3.generate(QUERY, memory.get_cache(item.kv_cache_id), 8)


def test_a_stored_cache_that_a_model_has_grown_is_noticed(stored_item, qwen3, tmp_path):
    memory, item = stored_item
    memory.dump(tmp_path)
    ids = torch.tensor([[*item.metadata.tokens.token_ids, 7, 8, 9]])
    qwen3.model.generate(ids, past_key_values=item.kv_cache, max_new_tokens=4, do_sample=False)
    for use in (
        lambda: memory.get_cache(item.kv_cache_id),
        lambda: memory.dump(tmp_path),
        lambda: memory.extract([{"role": "user", "content": QUERY}], base=item),
    ):
        with pytest.raises(StoredCacheError, match=r"never item\.kv_cache"):
            use()
    assert memory.load(tmp_path) == 1
    assert qwen3.generate(QUERY, memory.get_cache(item.kv_cache_id), 8).cached_tokens


@pytest.mark.parametrize("backend_name", ["qwen3", "sliding"])
def test_reset_of_a_view_writes_no_zeros_into_the_stored_memory(backend_name, request):
    """Up to transformers 5.18 a layer's reset overwrites its tensors in place: a view's are the stored ones."""
    memory = memory_on(request.getfixturevalue(backend_name))
    item = memory.extract(TEXT)
    memory.add(item)
    before = copy_of(item)
    view = memory.get_cache(item.kv_cache_id)
    view.reset()
    assert view.get_seq_length() == 0
    assert same_bits(item, before)
