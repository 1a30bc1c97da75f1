"""Several engines in one process: each saves and loads through its own connector, whatever becomes of the others."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvmem.engines.vllm.backend import VLLMBackend
from kvmem.engines.vllm.config import VLLMConfig
from kvmem.models.loading import load
from tests.helpers.tiny import CPU, pairs
from tests.vllm.conftest import on_engine

QUERY = "Which rule is the first?"
(TEXT, _), (OTHER, _) = pairs(2, 900, seed=21)


def opened(folder: Path, layers: int) -> VLLMBackend:
    """An engine of a small model with random weights and so many layers."""
    tiny = load("random:tiny_heads64", CPU, torch.float32)
    config = AutoConfig.for_model(**{**tiny.model.config.to_dict(), "num_hidden_layers": layers, "layer_types": None})
    torch.manual_seed(layers)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / str(layers))
    tiny.tokenizer.save_pretrained(folder / str(layers))
    settings = {"dtype": "float32", "max_model_len": 1024, "kv_cache_gib": 0.125}
    return VLLMBackend(VLLMConfig(str(folder / str(layers)), **settings))


def test_engines_of_different_depth_one_after_the_other(engine: VLLMBackend, tmp_path: Path) -> None:
    """The first model has 30 layers. Its memory is used last."""
    engine.reset()
    memory = on_engine(engine)
    item = memory.extract(TEXT)
    memory.add(item)
    before = engine.generate(QUERY, memory.get_cache(item.kv_cache_id), 12)
    for layers in (2, 4):
        other = opened(tmp_path, layers)
        second = on_engine(other)
        second.add(second.extract(OTHER))
        (stored,) = second.get_all()
        assert other.store.file_of(stored).path.parent == other.store.folder
        direct = other.generate([{"role": "system", "content": OTHER}, {"role": "user", "content": QUERY}], None, 12)
        other.reset()
        answer = other.generate(QUERY, second.get_cache(stored.kv_cache_id), 12)
        assert (answer.token_ids, answer.injected_tokens) == (direct.token_ids, stored.metadata.token_count)

        engine.reset()
        again = engine.generate(QUERY, memory.get_cache(item.kv_cache_id), 12)
        assert (again.token_ids, again.injected_tokens) == (before.token_ids, item.metadata.token_count)


def test_an_engine_that_is_dropped_does_not_stop_the_injections_of_another(engine: VLLMBackend, tmp_path: Path) -> None:
    engine.reset()
    memory = on_engine(engine)
    item = memory.extract(TEXT)
    memory.add(item)
    before = engine.generate(QUERY, memory.get_cache(item.kv_cache_id), 12)
    opened(tmp_path, 2).generate(QUERY, None, 2)
    gc.collect()
    engine.reset()
    after = engine.generate(QUERY, memory.get_cache(item.kv_cache_id), 12)
    assert (after.token_ids, after.injected_tokens) == (before.token_ids, item.metadata.token_count)
    item = memory.extract(OTHER)  # and it still saves
    assert item.kv_cache.get_seq_length() == item.metadata.token_count


def test_a_stream_goes_on_while_another_engine_answers(engine: VLLMBackend, tmp_path: Path) -> None:
    engine.reset()
    memory = on_engine(engine)
    memory.add(memory.extract(TEXT))
    cache_view = memory.get_cache(memory.get_all()[0].kv_cache_id)
    whole = engine.generate(QUERY, cache_view, 12)
    engine.reset()
    stream = engine.stream(QUERY, cache_view, 12)
    tokens = [next(stream).id]
    other = opened(tmp_path, 2)
    for token in stream:
        tokens.append(token.id)
        other.generate(QUERY, None, 1)
    assert tuple(tokens) == whole.token_ids
