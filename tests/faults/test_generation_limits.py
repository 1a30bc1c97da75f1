"""An answer ends where the model's positions end, and says so. Logits that are not numbers are an error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvmem.engines.generation import Sampling
from kvmem.engines.graph.backend import HFGraphBackend
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import ModelError, PromptError
from tests.helpers.tiny import loaded, memory_on, pairs

TEXT, QUERY = pairs(1, characters=300, seed=21)[0]
POSITIONS = 220
ENGINES = pytest.mark.parametrize("engine", [HFBackend, HFGraphBackend], ids=["huggingface", "hf_graph"])


def with_positions(engine: type[HFBackend], positions: int) -> HFBackend:
    model = loaded("tiny")
    model.model.config.max_position_embeddings = positions
    return engine(model)


@ENGINES
@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0, seed=4)], ids=["greedy", "sampled"])
def test_an_answer_ends_with_the_positions_and_says_so(engine: type[HFBackend], sampling: Sampling | None) -> None:
    short, long = with_positions(engine, POSITIONS), with_positions(engine, 4096)
    memory = memory_on(short)
    item = memory.extract(TEXT)
    memory.add(item)
    cache_view = memory.get_cache(item.kv_cache_id)
    left = POSITIONS - len(short.split(QUERY, cache_view).ids)
    assert 20 < left < POSITIONS
    turns = [{"role": "system", "content": TEXT}, {"role": "user", "content": QUERY}]
    whole = long.generate(turns, None, left, sampling)
    assert whole.finish_reason == "length"
    expected = replace(whole, cached_tokens=item.metadata.token_count, finish_reason="context_length")
    for asked in (left + 1, 10_000):
        assert short.generate(QUERY, cache_view, asked, sampling) == expected
        streamed = list(short.stream(QUERY, cache_view, asked, sampling))
        assert [token.id for token in streamed] == list(whole.token_ids)
        assert [token.finish_reason for token in streamed] == [None] * (left - 1) + ["context_length"]
    assert short.generate(QUERY, cache_view, left, sampling) == replace(expected, finish_reason="length")


@ENGINES
def test_an_answer_that_stops_says_so(engine: type[HFBackend]) -> None:
    backend = with_positions(engine, 4096)
    ids = backend.generate(QUERY, None, 12).token_ids
    backend.end_tokens = frozenset({ids[5]})
    stopped = backend.generate(QUERY, None, 12)
    assert stopped.token_ids == ids[: ids.index(ids[5])] and stopped.finish_reason == "stop"
    assert [token.finish_reason for token in backend.stream(QUERY, None, 12)] == [None] * len(stopped.token_ids)


@ENGINES
def test_a_prompt_that_leaves_no_position_is_refused(engine: type[HFBackend]) -> None:
    length = len(with_positions(engine, 4096).split(QUERY).ids)
    full = with_positions(engine, length)
    for answer in (full.generate, full.stream):
        with pytest.raises(PromptError, match=f"{length} tokens"):
            answer(QUERY, None, 4)
    assert len(with_positions(engine, length + 1).generate(QUERY, None, 4).token_ids) == 1


@ENGINES
@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0)], ids=["greedy", "sampled"])
def test_logits_that_are_not_numbers_are_an_error(engine: type[HFBackend], sampling: Sampling | None) -> None:
    """As a model gives them whose activations overflow float16."""
    model = loaded("tiny")
    with torch.no_grad():
        model.model.lm_head.weight.fill_(torch.nan)
    backend = engine(model)
    with pytest.raises(ModelError, match=r"not numbers \(NaN\).*bfloat16"):
        backend.generate(QUERY, None, 4, sampling)
    with pytest.raises(ModelError, match="not numbers"):
        list(backend.stream(QUERY, None, 4, sampling))
