"""Decoding ahead of the host, batches behind one memory, capacity, warming up, compiled layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch._inductor.utils import run_and_get_code

from experiments.measurement.engine_adapters import engine_conditions
from kvmem.engines.graph.backend import HFGraphBackend
from kvmem.engines.graph.config import GraphConfig
from kvmem.errors import CapacityError
from tests.graph.conftest import SETTINGS, prompt_of, stored, weights
from tests.graph.test_graph_engine import QUERY, TEXTS, along
from tests.helpers.tiny import QUESTIONS


def test_eight_queries_behind_one_memory(open_engine):
    fast = open_engine(buffers=1)
    memory, item = stored(fast, TEXTS[0])
    queries = ["Why?", QUERY, "Name it.", "Which?", "How is an error raised, and where?", "When?", "Who?", "a " * 90]
    cache_view = memory.get_cache(item.kv_cache_id)
    alone = [fast.generate(query, memory.get_cache(item.kv_cache_id), 8) for query in queries]
    together = fast.answer_batch(queries, cache_view, 8)
    if fast.dtype == torch.float32:
        assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    else:  # a near tie may fall the other way; the first token's logits are compared below
        agree = sum(a.token_ids == b.token_ids for a, b in zip(together, alone, strict=True))
        assert agree >= len(queries) / 2
    assert all(answer.cached_tokens == item.metadata.token_count for answer in together)
    assert len(fast.engine.slots) == 1  # the memory was placed once


def test_beyond_the_capacity_is_refused_with_the_knob(open_engine):
    fast = open_engine(capacity_tokens=100)
    with pytest.raises(CapacityError, match=r"120 tokens .* capacity_tokens=100\. Raise it \(\d+ kB a token"):
        fast.prefill(prompt_of(0, 120))
    memory, item = stored(fast, TEXTS[0][:150])
    left = 100 - item.metadata.token_count
    answer_of = fast.engine.begin(item.kv_cache, item.metadata.token_count, [5] * left)[1]
    with pytest.raises(CapacityError, match="101 tokens"):
        fast.decode_one_token(7, answer_of)
    with pytest.raises(CapacityError, match="capacity_tokens=100"):
        memory.extract(TEXTS[1])
    assert fast.first_token(prompt_of(0, 100)).cached_tokens == 0  # the last row is usable too


def test_answers_end_at_the_capacity_and_say_so(open_engine):
    """Prompt and answer fill the buffer, as they fill a model's positions on every engine, and the answer says so."""
    fast = open_engine(capacity_tokens=100)
    memory, item = stored(fast, TEXTS[0][:150])
    cache_view = memory.get_cache(item.kv_cache_id)
    most = 100 - len(fast.split("Why?", cache_view).ids)
    alone = fast.generate("Why?", cache_view, most)
    assert len(alone.token_ids) == most and alone.finish_reason == "length"
    assert fast.generate("Why?", cache_view, most + 1) == replace(alone, finish_reason="context_length")
    *_, last = fast.stream("Why?", cache_view, most + 1)
    assert last.finish_reason == "context_length"
    for asked, reason in ((most, "length"), (most + 1, "context_length"), (100, "context_length")):
        answers = fast.answer_batch(["Why?"] * 2, cache_view, asked)
        assert [(len(answer.token_ids), answer.finish_reason) for answer in answers] == [(most, reason)] * 2


def test_in_a_batch_each_answer_ends_at_the_capacity(open_engine):
    fast = open_engine(capacity_tokens=100)
    memory, item = stored(fast, TEXTS[0][:150])
    queries = ["Why?", "Why is that so, and since when, and who said it first?"]
    prompts = [fast.split(query, memory.get_cache(item.kv_cache_id)) for query in queries]
    answers = fast.answer_batch(queries, memory.get_cache(item.kv_cache_id), 100)
    assert [len(answer.token_ids) for answer in answers] == [100 - len(prompt.ids) for prompt in prompts]
    if fast.dtype == torch.float32:
        alone = [fast.generate(query, memory.get_cache(item.kv_cache_id), 100) for query in queries]
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in alone]


@pytest.mark.parametrize("tokens", [0, -8])
def test_no_prefill_of_no_tokens_is_warmed_up(tokens):
    with pytest.raises(ValidationError, match="warm_tokens"):
        GraphConfig(warm_tokens=(tokens,))


@pytest.mark.slow
def test_compiled_for_all_lengths_at_once(open_engine, eager, setting):
    """On a CPU too, where it takes a C++ compiler: one compilation serves every length, answers stay the
    same, and the compiled code makes no copy of a buffer."""
    before = torch._dynamo.utils.counters["frames"]["ok"]  # of the tests that ran in this process earlier
    if setting.device != "cpu":
        pytest.skip("every other test on a GPU compiles")
    torch._dynamo.reset()
    fast = open_engine(compile="all_lengths")
    memory, item = stored(fast, TEXTS[0])
    _, code = run_and_get_code(fast.generate, QUERY, memory.get_cache(item.kv_cache_id), 2)
    assert "kvmem.attend" in "".join(code)
    rows = str(fast.engine.rows)
    assert not [line for source in code for line in source.splitlines() if "empty" in line and rows in line]
    for new in (9, 30, 64, 65):
        prompt = type(prompt_of(0, 1))(item.metadata.tokens.token_ids, prompt_of(0, new).query_ids)
        assert along(fast, eager, prompt, memory.get_cache(item.kv_cache_id), 2) < setting.tolerance
    frames = torch._dynamo.utils.counters["frames"]["ok"] - before
    assert frames <= 6  # of any length and of one token, each as an inner and as the last layer


def test_decoding_ahead_is_decoding_step_by_step(open_engine):
    fast = open_engine()
    memory, item = stored(fast, TEXTS[0])
    cache_view = memory.get_cache(item.kv_cache_id)
    streamed = [token.id for token in fast.stream(QUERY, cache_view, 24)]
    whole = fast.generate(QUERY, cache_view, 24)
    assert list(whole.token_ids) == streamed
    stop = whole.token_ids[9]
    logits_V, answer = fast.prefill(fast.split(QUERY, cache_view), cache_view)
    first, length = int(logits_V.argmax()), answer.length
    tokens = fast.engine.greedy(answer, first, 23, {stop})
    assert [first, *tokens] == streamed[: streamed.index(stop)]
    assert answer.length == length + 1 + len(tokens)  # what was computed beyond the end token does not count
    # and decoding continues from there as if nothing had been computed ahead
    again = fast.decode_one_token(stop, answer)
    assert int(again.argmax()) == streamed[streamed.index(stop) + 1]


def test_decoding_stops_at_the_capacity(open_engine):
    fast = open_engine(capacity_tokens=200)
    logits_V, answer = fast.prefill(prompt_of(0, 190))
    with pytest.raises(CapacityError, match="210 tokens"):
        fast.engine.greedy(answer, int(logits_V.argmax()), 20, set())
    assert len(fast.engine.greedy(fast.prefill(prompt_of(0, 190))[1], 5, 10, set())) == 10


def test_lengths_to_warm_are_ready_in_every_buffer(open_engine):
    fast = open_engine(warm_tokens=[8, 24], buffers=2)
    assert len(fast.engine.slots) == 2 and all(slot.sequence is None for slot in fast.engine.slots)
    ready = engine_conditions(fast)["warm_up"]
    if fast.device.type == "cpu":
        assert ready == {"seconds": 0.0, "graphs": 0, "graph_bytes": 0}
        return
    assert ready["graphs"] == 8 and ready["seconds"] > 0  # two lengths, one token, decoding; in two buffers
    fast.generate("Why?", None, 4)
    fast.prefill(prompt_of(0, 20))
    assert engine_conditions(fast)["warm_up"]["graphs"] in (8, 9)  # the query may be longer


@pytest.mark.gpu
def test_a_model_on_the_second_gpu():
    """Graphs, kernels and buffers follow the model, and not the thread's own GPU."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} GPUs are here, and this needs 2")
    answers, engines = [], []
    for device in ("cuda:0", "cuda:1"):  # the first captures first, and torch then has its stream for captures there
        setting = replace(SETTINGS["gpu-bf16-fastest"], device=device)
        fast = HFGraphBackend(
            weights(setting, setting.shape), "chat", GraphConfig(capacity_tokens=2048, compile="none")
        )
        memory, item = stored(fast, TEXTS[0])
        answers.append([fast.generate(query, memory.get_cache(item.kv_cache_id), 12) for query in QUESTIONS])
        answers[-1] += fast.answer_batch(QUESTIONS, memory.get_cache(item.kv_cache_id), 4)
        assert {slot.buffer.layers[0][0].device for slot in fast.engine.slots} == {torch.device(device)}
        assert fast.engine.warm_up.graphs > 0 and fast.engine.fused
        engines.append((fast, memory.get_cache(item.kv_cache_id)))
    assert answers[0] == answers[1]
    assert torch.cuda.current_device() == 0
    for fast, cache_view in reversed(engines):  # and in turns, with lengths that were not captured yet
        answers.append(
            fast.generate("Which of these is the one that the last paragraph of the text is about?", cache_view)
        )
    assert answers[2] == answers[3]


@pytest.mark.gpu
@pytest.mark.parametrize("current", [0, 1])
def test_kernels_run_on_their_tensors_gpu(current: int):
    """Whatever the current device is, which Triton would launch on."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} GPUs are here, and this needs 2")
    from kvmem.engines.graph import triton_kernels

    device = torch.device("cuda", 1 - current)
    x_C, weight_RC = torch.randn(64, device=device), torch.randn(32, 64, device=device)
    with torch.cuda.device(current):
        torch.testing.assert_close(triton_kernels.product(x_C, weight_RC), weight_RC @ x_C, rtol=1e-4, atol=1e-4)
        assert torch.cuda.current_device() == current


@pytest.mark.slow
def test_batches_of_any_size_run_compiled(open_engine, setting):
    """At its limit of compilations torch would run uncompiled code, which is slow, without a warning."""
    if setting.device != "cpu":
        pytest.skip("the same on a CPU, where it takes less")
    torch._dynamo.reset()
    fast = open_engine(compile="all_lengths")
    memory, item = stored(fast, TEXTS[0])
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for query in ("Why?", QUERY):
            for batch in (1, 2, 3, 4):
                answers = fast.answer_batch([query] * batch, memory.get_cache(item.kv_cache_id), 3)
                assert len({answer.token_ids for answer in answers}) == 1
