"""Pinned memories stay while requests evict others, by the engine's own count; pins leave blocks for requests."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pydoc_data.topics import topics

import pytest

from kvmem import KVCacheMemory
from kvmem.cache.items import KVCacheItem
from kvmem.engines.vllm.backend import VLLMBackend
from kvmem.engines.vllm.config import VLLMConfig
from kvmem.engines.vllm.requests import GenerationRequest, VLLMGeneration
from kvmem.errors import ConfigError, EngineError, UnknownMemoryError
from tests.vllm.conftest import SETTINGS, on_engine

TEXTS = [topics[page][:1200] for page in sorted(topics) if len(topics[page]) > 1200][:4]
QUERY = "Which rule is the first?"
BLOCK_TOKENS = 128
WINDOW_BLOCKS = 12


@pytest.fixture
def memory(engine: VLLMBackend) -> Iterator[KVCacheMemory]:
    engine.reset()
    yield on_engine(engine)
    engine.reset(unpin=True)


@pytest.fixture(scope="module")
def filler(engine: VLLMBackend) -> KVCacheItem:
    """A memory that nearly fills the window: under each salt it takes eleven blocks."""
    ids = engine.tokenizer.encode(max(topics.values(), key=len))[:1350]
    item = on_engine(engine).extract(engine.tokenizer.decode(ids))
    assert 10 * BLOCK_TOKENS < item.metadata.token_count < 11 * BLOCK_TOKENS
    return item


def evict(engine: VLLMBackend, filler: KVCacheItem) -> None:
    """Sends requests that take every block that is not pinned: each leaves ten full blocks."""
    for i in range(19):
        engine.generate(QUERY, engine.store.view(filler), 1, cache_salt=f"traffic {i}")


def whole_blocks(tokens: int) -> int:
    return tokens // BLOCK_TOKENS * BLOCK_TOKENS


def test_a_pinned_memory_stays_while_others_are_evicted(
    engine: VLLMBackend, memory: KVCacheMemory, filler: KVCacheItem
) -> None:
    pinned, control = memory.extract(TEXTS[:2])
    memory.add([pinned, control])
    views = [memory.get_cache(item.kv_cache_id) for item in (pinned, control)]
    held = whole_blocks(pinned.metadata.token_count)
    before = [engine.generate(QUERY, handle, 8) for handle in views]
    assert engine.pins.pin(pinned) == held > 0
    evict(engine, filler)

    hit, miss = (engine.generate(QUERY, handle, 8) for handle in views)
    assert (hit.local_tokens, hit.injected_tokens) == (held, pinned.metadata.token_count - held)
    assert (miss.local_tokens, miss.injected_tokens) == (0, control.metadata.token_count)
    assert (hit.token_ids, miss.token_ids) == (before[0].token_ids, before[1].token_ids)

    engine.pins.unpin(pinned.kv_cache_id)
    evict(engine, filler)
    assert engine.generate(QUERY, views[0], 8).local_tokens == 0


def test_reset_names_what_is_pinned(engine: VLLMBackend, memory: KVCacheMemory) -> None:
    item = memory.extract(TEXTS[2])
    memory.add(item)
    engine.pins.pin(item)
    with pytest.raises(EngineError, match=item.kv_cache_id):
        engine.reset()
    engine.reset(unpin=True)
    cache_view = memory.get_cache(item.kv_cache_id)
    assert engine.generate(QUERY, cache_view, 1).local_tokens == 0
    with pytest.raises(EngineError, match="not pinned"):
        engine.pins.unpin(item)
    with pytest.raises(UnknownMemoryError, match="no such id"):
        engine.pins.pin("no such id")


def test_a_deleted_memory_is_unpinned(engine: VLLMBackend, memory: KVCacheMemory) -> None:
    memory.add(memory.extract(TEXTS[3]))
    (kv_cache_id,) = (item.kv_cache_id for item in memory.get_all())
    engine.pins.pin(kv_cache_id)
    engine.pins.pin(kv_cache_id)  # pinned twice is pinned once
    with pytest.raises(EngineError, match=kv_cache_id):
        engine.reset()
    memory.delete(kv_cache_id)
    gc.collect()
    engine.reset()


def test_a_pin_is_of_one_salt(engine: VLLMBackend, memory: KVCacheMemory, filler: KVCacheItem) -> None:
    item = memory.extract(TEXTS[0])
    memory.add(item)
    held = engine.pins.pin(item, cache_salt="tenant a")
    evict(engine, filler)
    cache_view = memory.get_cache(item.kv_cache_id)
    assert engine.generate(QUERY, cache_view, 1, cache_salt="tenant b").local_tokens == 0
    assert engine.generate(QUERY, cache_view, 1, cache_salt="tenant a").local_tokens == held


def test_an_item_that_can_not_be_pinned_is_a_named_error(engine: VLLMBackend, memory: KVCacheMemory) -> None:
    short = memory.extract("The sky is green.")
    with pytest.raises(EngineError, match="shorter than one block"):
        engine.pins.pin(short)
    gone = memory.extract(TEXTS[1])
    engine.store.file_of(gone).path.unlink()
    with pytest.raises(EngineError, match=f"{gone.kv_cache_id} is not pinned: .*deleted"):
        engine.pins.pin(gone)
    engine.reset()  # nothing is left pinned


def test_pins_leave_blocks_for_requests_and_preempted_answers_are_equal(
    engine: VLLMBackend, memory: KVCacheMemory, filler: KVCacheItem
) -> None:
    total = engine.llm.llm_engine.vllm_config.cache_config.num_gpu_blocks - 1
    most = (total - WINDOW_BLOCKS) // 10
    for i in range(most):
        assert engine.pins.pin(filler, cache_salt=f"pin {i}") == 10 * BLOCK_TOKENS
    numbers = rf"10 blocks more than the {10 * most} pinned.*{total} blocks {WINDOW_BLOCKS}"
    with pytest.raises(EngineError, match=numbers):
        engine.pins.pin(filler, cache_salt="one too many")

    # The blocks that are left hold all requests while their answers are short, but not when each needs a second block.
    left = total - 10 * most
    small = memory.extract(TEXTS[0][:280])
    memory.add(small)
    cache_view = memory.get_cache(small.kv_cache_id)
    words = " please" * (BLOCK_TOKENS - 8 - len(engine.split("10", cache_view).ids))
    assert BLOCK_TOKENS - 16 < len(engine.split(f"10{words}", cache_view).ids) < BLOCK_TOKENS
    asks = [GenerationRequest(f"{i}{words}", cache_view, 16, cache_salt=str(i), past_end=True) for i in range(left)]
    together = engine.generate_batch(asks)
    assert all(isinstance(answer, VLLMGeneration) for answer in together), together
    preempted = [i for i, answer in enumerate(together) if answer.preemptions]
    assert preempted
    for i in {0, preempted[0]}:
        (alone,) = engine.generate_batch([asks[i]])
        assert (alone.token_ids, alone.preemptions) == (together[i].token_ids, 0)


@pytest.mark.xdist_group("engine")
def test_blocks_for_less_than_the_window_are_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_gib=0.0625 holds 1280 tokens.*window is 1536"):
        VLLMBackend(VLLMConfig(**{**SETTINGS, "kv_cache_gib": 0.0625}))
