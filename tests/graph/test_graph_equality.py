"""The fast engine answers as Hugging Face does, for every covered family; each engine uses the other's items."""

from __future__ import annotations

import pytest
import torch

from experiments.measurement.engine_adapters import engine_conditions
from kvmem import KVCacheMemory, KVCacheMemoryConfig
from kvmem.cache.dynamic_cache import layers_of
from kvmem.engines.graph.backend import HFGraphBackend
from kvmem.engines.graph.config import GraphConfig
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.models.loading import Loaded
from tests.helpers.tiny import SHAPES, loaded, memory_on, pairs
from tests.huggingface.test_equivalence import check_pairs


@pytest.mark.parametrize("family", sorted(SHAPES))
def test_twenty_pairs_on_each_family(family):
    backend = HFGraphBackend(loaded(SHAPES[family]), "chat", GraphConfig(pad_to=8, capacity_tokens=1024))
    assert backend.model_config.model_type == family
    check_pairs(backend, pairs(20, characters=600))


def on_the_engine(backend):
    return HFGraphBackend(Loaded(backend.model, backend.tokenizer, backend.fingerprint.origin), backend.template.kind)


def test_pairs_on_smollm2(smollm2):
    check_pairs(on_the_engine(smollm2), pairs(2, characters=400))


def test_an_engine_uses_the_items_of_the_other(tiny, tmp_path):
    hf, fast = tiny("llama"), on_the_engine(tiny("llama"))
    assert fast.fingerprint == hf.fingerprint
    text, query = pairs(1, characters=500, seed=3)[0]
    on_hf, on_fast = memory_on(hf), memory_on(fast)
    for built, other in ((on_hf, on_fast), (on_fast, on_hf)):
        item = built.extract(text)
        built.add(item)
        built.dump(tmp_path)
        assert other.load(tmp_path) == 1
        first, second = (
            memory.backend.generate(query, memory.get_cache(item.kv_cache_id), 16) for memory in (built, other)
        )
        assert first == second and first.cached_tokens == item.metadata.token_count
        built.delete_all()
        other.delete_all()


def test_a_dialogue_continues_after_its_base(tiny):
    hf, fast = tiny("qwen3"), on_the_engine(tiny("qwen3"))
    turns = [
        {"role": role, "content": text[:200]}
        for role, (text, _) in zip(("system", "user", "assistant", "user", "assistant"), pairs(5, 400), strict=True)
    ]
    whole = memory_on(hf).extract(turns)
    memory = memory_on(fast)
    begun = memory.extract(turns[:3])
    extended = memory.extract(turns[3:], base=begun)
    assert extended.metadata.tokens == whole.metadata.tokens
    for ours, theirs in zip(layers_of(extended.kv_cache), layers_of(whole.kv_cache), strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_hugging_face_runs_on_the_same_weights(qwen3):
    """Its weights are views of the engine's: the model is as it was, and nothing is stored twice."""
    before = qwen3.generate("Why?", max_new_tokens=8)
    fast = on_the_engine(qwen3)
    assert qwen3.generate("Why?", max_new_tokens=8) == before == fast.generate("Why?", max_new_tokens=8)
    attention = qwen3.model.model.layers[0].self_attn
    stacked = fast.engine.run.layers[0].qkv
    for part in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert part.weight.untyped_storage().data_ptr() == stacked.untyped_storage().data_ptr()
    again = on_the_engine(qwen3)
    assert again.engine.run.layers[0].qkv.data_ptr() == stacked.data_ptr()


def test_the_backend_opens_by_its_name():
    config = {"model_name_or_path": "random:tiny", "device": "cpu", "capacity_tokens": 512}
    memory = KVCacheMemory(KVCacheMemoryConfig(extractor_llm={"backend": "hf_graph", "config": config}))
    assert isinstance(memory.backend, HFGraphBackend) and memory.backend.engine.config.capacity_tokens == 512
    assert engine_conditions(memory.backend)["left_out"] == "CUDA graphs, compiled layers, fused kernels"
    assert memory.backend.attention == "sdpa"


def test_weights_that_lie_in_one_memory_in_another_order_are_distinguished():
    """A loader may read a file into one allocation, in another order than the engine's: queries, values, keys."""
    eager, reordered = HFBackend(loaded("tiny")), loaded("tiny")
    for layer in reordered.model.get_decoder().layers:
        parts = [layer.self_attn.q_proj.weight, layer.self_attn.v_proj.weight, layer.self_attn.k_proj.weight]
        flat = torch.cat([part.data.flatten() for part in parts])
        for part, stretch in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.data = stretch.view(part.shape)
    fast = HFGraphBackend(reordered)
    assert fast.generate("Why is that so?", None, 8).token_ids == eager.generate("Why is that so?", None, 8).token_ids
    weights = fast.engine.run.layers[0].qkv
    assert HFGraphBackend(reordered).engine.run.layers[0].qkv.data_ptr() == weights.data_ptr()  # found, not copied
