"""Memories of models with states, latents or indexer keys: every answer is that of the prompt sent whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvmem import KVCacheMemory
from kvmem.cache import dynamic_cache
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import ModelError
from kvmem.models import continues_in_one_step
from kvmem.tiers import TieredCache
from tests.helpers.architectures import (
    IS_SPARSE_COVERED,
    OF_OTHER_SIZES,
    SPARSE,
    WITH_STATES,
    copy_of_contents,
    covered,
    greedy_without_cache,
    has_contents,
    shipped,
    tiny_architecture,
)
from tests.helpers.tiny import memory_on

TEXT = "Kiwis are flightless birds of New Zealand. They lay the largest eggs for their size, and they sleep by day."
QUERY, OTHER_QUERY = "Can kiwis fly?", "When do they sleep, and where do they live?"
TURNS = [{"role": "system", "content": TEXT}, {"role": "user", "content": "Why?"}]
LATER = [{"role": "assistant", "content": "Nobody knows."}]
STEPS = 4


@pytest.fixture(params=[*covered(WITH_STATES), *covered(OF_OTHER_SIZES)])
def backend(request: pytest.FixtureRequest) -> HFBackend:
    """Each of the tiny models."""
    return tiny_architecture(request.param)


def check_answers(backend: HFBackend, memory: KVCacheMemory, item_id: str) -> None:
    """Asks two queries, each on a view of its own and on one view: equal to the whole prompt without any cache."""
    stored = memory.get(item_id).metadata.token_count
    shared_view = memory.get_cache(item_id)
    for query in (QUERY, OTHER_QUERY):
        view = memory.get_cache(item_id)
        expected = greedy_without_cache(backend, backend.split(query, view).ids, STEPS)
        for cache in (view, shared_view):
            answer = backend.generate(query, cache, STEPS)
            assert answer.token_ids == expected
            assert answer.cached_tokens == stored and not answer.note


def test_answers_equal_the_whole_prompt(backend):
    memory = memory_on(backend)
    item = memory.extract(TEXT)
    memory.add(item)
    before = copy_of_contents(item)
    check_answers(backend, memory, item.kv_cache_id)
    assert has_contents(item, before)
    assert backend.recomputed == 0


def test_a_memory_changes_the_answer(backend):
    """Else the test above would pass for a model that ignores what it is given."""
    memory = memory_on(backend)
    item = memory.extract(TEXT)
    memory.add(item)
    view = memory.get_cache(item.kv_cache_id)
    prompt = backend.split(QUERY, view)
    with torch.inference_mode():
        alone = backend.model(input_ids=torch.tensor([prompt.query_ids]), use_cache=False).logits[0, -1]
    assert not torch.allclose(backend.first_token(prompt, view).logits_V, alone, rtol=0, atol=1e-2)


def test_an_extended_base(backend):
    memory = memory_on(backend)
    base = memory.extract(TURNS)
    before = copy_of_contents(base)
    extended, whole = memory.extract(LATER, base=base), memory.extract([*TURNS, *LATER])
    assert extended.metadata.tokens == whole.metadata.tokens
    assert has_contents(base, before)
    memory.add([base, extended])
    check_answers(backend, memory, extended.kv_cache_id)
    assert backend.recomputed == 0
    for ours, theirs in zip(
        dynamic_cache.contents_of(extended.kv_cache), dynamic_cache.contents_of(whole.kv_cache), strict=True
    ):
        assert list(ours) == list(theirs)
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-3) for name in ours)


@pytest.mark.parametrize("filename", ["memory.safetensors", "memory.pickle"])
def test_dump_and_load(backend, tmp_path: Path, filename: str):
    memory = memory_on(backend, memory_filename=filename)
    item = memory.extract(TEXT)
    memory.add(item)
    memory.dump(tmp_path)
    loaded = memory_on(backend, memory_filename=filename)
    assert loaded.load(tmp_path) == 1
    assert loaded.get_all()[0].metadata == item.metadata
    assert has_contents(loaded.get_all()[0], copy_of_contents(item))
    check_answers(backend, loaded, item.kv_cache_id)


def test_a_tiers_move(backend, tmp_path: Path):
    memory = memory_on(backend)
    item = memory.extract(TEXT)
    before, size = copy_of_contents(item), item.metadata.kv_bytes
    tiers = TieredCache(backend, {"ram": size, "disk": size}, tmp_path)
    assert tiers.size("ram", item.metadata.token_count) == size, "bytes a memory and bytes a token"
    tiers.put(item, "ram")
    assert tiers.move(item.kv_cache_id, "disk")
    tiers.close()
    restored = TieredCache(backend, {"ram": size, "disk": size}, tmp_path)
    for tier in ("disk", "ram"):
        assert restored.move(item.kv_cache_id, tier) and restored.used_bytes()[tier] == size
        with restored.use(item.kv_cache_id) as used:
            assert has_contents(used, before)
    memory.add(used)
    check_answers(backend, memory, item.kv_cache_id)
    restored.close()


def test_bytes_are_those_that_the_fingerprint_states(backend):
    short, long = (backend.build(TEXT * times) for times in (1, 2))
    for item in (short, long):
        assert item.metadata.kv_bytes == backend.fingerprint.kv_bytes(item.metadata.token_count)
    has_states = backend.model_config.model_type in WITH_STATES
    assert (backend.fingerprint.kv_bytes(0) > 0) == backend.fingerprint.keeps_states == has_states


@pytest.mark.parametrize("model_type", shipped(WITH_STATES))
def test_a_memory_that_is_no_prefix_is_computed_again(model_type: str):
    backend = tiny_architecture(model_type)
    item = backend.build(TEXT)
    before, counted = copy_of_contents(item), backend.recomputed
    tokens = item.metadata.tokens
    shorter = tokens.model_copy(update={"token_ids": tokens.token_ids[:-3]})
    view = dynamic_cache.view_of(item.kv_cache, shorter, backend.model_config, fingerprint=backend.fingerprint)
    answer = backend.generate(QUERY, view, STEPS)
    assert answer.token_ids == greedy_without_cache(backend, backend.split(QUERY, view).ids, STEPS)
    assert answer.cached_tokens == 0 and "computed again" in answer.note
    assert backend.recomputed == counted + 1
    assert has_contents(item, before)


@pytest.mark.parametrize("model_type", [name for name in shipped(WITH_STATES) if name in ("jamba", "zamba", "bamba")])
def test_which_models_continue_in_one_step(model_type: str):
    """transformers' Mamba layers begin from zero when several tokens follow a state, Mamba 2 layers do not."""
    assert continues_in_one_step(tiny_architecture(model_type).model) == (model_type == "bamba")


@pytest.mark.skipif(IS_SPARSE_COVERED, reason="this version of transformers computes sparse attention rightly")
@pytest.mark.parametrize("model_type", [name for name in shipped(OF_OTHER_SIZES) if name in SPARSE])
def test_what_an_older_transformers_miscomputes_is_refused_by_name(model_type: str):
    with pytest.raises(ModelError, match=rf"{model_type} .*DynamicIndexedLayer.* Install 5\.19 or later"):
        tiny_architecture(model_type)
