"""Requests with another model's cache, or with arguments of a wrong type, are refused, and nothing changes."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kvmem import KVCacheItem
from kvmem.engines.base import FileHandle
from kvmem.engines.generation import Sampling
from kvmem.engines.graph.backend import HFGraphBackend
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.engines.vllm.memory_files import split_behind
from kvmem.errors import ArgumentError, ConfigError, FingerprintError, PromptError
from tests.helpers.tiny import kind, loaded, memory_on, pairs, view_by

TEXT, OTHER = (text for text, _ in pairs(2, characters=300, seed=7))
OTHER_FAMILIES = ["qwen2", "llama", "mistral"]  # another head size; more layers too; fewer heads, which would broadcast


@pytest.fixture(scope="module")
def graph():
    """The fast engine, on the weights of `qwen3`."""
    return HFGraphBackend(loaded("tiny"))


@pytest.fixture(params=["huggingface", "hf_graph"])
def backend(request, qwen3, graph):
    return qwen3 if request.param == "huggingface" else graph


@pytest.mark.parametrize("family_name", OTHER_FAMILIES)
def test_a_cache_of_another_architecture_is_refused(stored, backend, tiny, family_name):
    cache = view_by(tiny(family_name), OTHER)
    for answer in (backend.generate, backend.stream, backend.split):
        with pytest.raises(FingerprintError, match="comes from another model: architecture: Qwen3ForCausalLM here"):
            answer("Why?", cache)


@pytest.mark.parametrize("family_name", OTHER_FAMILIES)
def test_a_cache_of_another_shape_that_does_not_say_whose_it_is_is_refused(stored, backend, tiny, family_name):
    cache = view_by(tiny(family_name), OTHER)
    cache.fingerprint = None
    with pytest.raises(FingerprintError, match=r"(layers|kv_heads|head_dim): \d+ here, \d+ there"):
        backend.generate("Why?", cache)


def test_a_cache_of_other_weights_of_the_same_shape_is_refused(stored, backend):
    with pytest.raises(FingerprintError, match="comes from another model: weights"):
        backend.generate("Why?", view_by(HFBackend(loaded("tiny", seed=1)), OTHER))


def test_a_cache_of_the_same_model_in_another_backend_is_taken(qwen3, graph):
    expected = qwen3.generate("Why?", view_by(qwen3, OTHER), 8)
    assert expected.cached_tokens > 0
    assert graph.generate("Why?", view_by(qwen3, OTHER), 8) == expected
    assert qwen3.generate("Why?", view_by(graph, OTHER), 8) == expected


def test_an_item_of_another_model_gets_no_view(backend, tiny):
    item = memory_on(tiny("qwen2")).extract(OTHER)
    config = memory_on(backend).config
    with pytest.raises(FingerprintError, match=f"Item {item.kv_cache_id} was built by another model"):
        backend.view([item], config.merge, config.separator)


def test_an_item_without_tensors_gets_no_view(qwen3):
    """For example a prefix on a server."""
    item = memory_on(qwen3).extract(OTHER)
    config = memory_on(qwen3).config
    bare = KVCacheItem(DynamicCache(), item.metadata)
    with pytest.raises(FingerprintError, match="The cache has 0 layers and this model 2"):
        qwen3.view([bare], config.merge, config.separator)


@pytest.mark.parametrize("what", ["item", "its cache", "its id", "ids", "tuple", "a file"])
def test_anything_but_a_view(stored, backend, what):
    item = stored.get_all()[0]
    given = {
        "item": item,
        "its cache": item.kv_cache,
        "its id": item.kv_cache_id,
        "ids": [item.kv_cache_id],
        "tuple": ((torch.zeros(1), torch.zeros(1)),),
        "a file": FileHandle(item.metadata.tokens, None),
    }[what]
    for answer in (backend.generate, backend.stream):
        with pytest.raises(ArgumentError, match=r"A cache has to be CacheView, not .*get_cache"):
            answer("Why?", given)


def test_caches_that_vllm_can_not_inject(stored, qwen3):
    cache = stored.get_cache(stored.get_all()[0].kv_cache_id)
    with pytest.raises(ArgumentError, match="What vLLM injects has to be FileHandle, not CacheView"):
        split_behind(qwen3.template, "Why?", cache)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "query",
    [
        None,
        3,
        b"x",
        ["x"],
        [3],
        {"role": "user", "content": "x"},
        [{"role": "user"}],
        [{"role": "user", "content": 3}],
        [{"content": "x"}],
    ],
    ids=kind,
)
@pytest.mark.parametrize("behind", [True, False], ids=["behind a memory", "behind nothing"])
def test_anything_but_a_query(stored, backend, query, behind):
    cache = view_by(backend, TEXT) if behind else None
    for answer in (backend.generate, backend.stream):
        with pytest.raises(PromptError, match=r"A query is a text or a list of chat turns|A turn is"):
            answer(query, cache)


@pytest.mark.parametrize("tokens", [None, "3", 2.5])
def test_max_new_tokens_that_is_not_a_number(backend, tokens):
    for answer in (backend.generate, backend.stream):
        with pytest.raises(ArgumentError, match=r"max_new_tokens has to be .* whole number"):
            answer("Why?", None, tokens)


@pytest.mark.parametrize("tokens", [0, -1])
def test_max_new_tokens_below_one(backend, tokens):
    for answer in (backend.generate, backend.stream):
        with pytest.raises(ConfigError, match=f"max_new_tokens is {tokens}"):
            answer("Why?", None, tokens)


@pytest.mark.parametrize("sampling", [0.7, "greedy", {"temperature": 1.0}], ids=kind)
def test_anything_but_sampling(backend, sampling):
    for answer in (backend.generate, backend.stream):
        with pytest.raises(ArgumentError, match=r"Give Sampling\(temperature=...\)"):
            answer("Why?", None, 3, sampling)


def test_answer_batch_of_wrong_kinds(graph, tiny):
    cache = view_by(graph, OTHER)
    assert graph.answer_batch([], cache) == []
    with pytest.raises(ArgumentError, match=r"queries has to be list or tuple, not str. For one query, use generate"):
        graph.answer_batch("Why?", cache)
    with pytest.raises(FingerprintError, match="another model"):
        graph.answer_batch(["Why?"], view_by(tiny("mistral"), OTHER))
    with pytest.raises(ArgumentError, match="Give Sampling"):
        graph.answer_batch(["Why?"], cache, 3, {"temperature": 1.0})


def test_a_refused_call_leaves_the_view_usable(stored, backend):
    cache, unused = view_by(backend, TEXT), view_by(backend, TEXT)
    with pytest.raises(ArgumentError):
        backend.generate("Why?", cache, "8")
    with pytest.raises(PromptError):
        backend.generate(3, cache, 8)
    assert backend.generate("Why?", cache, 8, Sampling()) == backend.generate("Why?", unused, 8)
