"""The engine's own work: bucket edges, switching memories, answers that take turns, capacity."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from transformers import AutoModelForCausalLM, MistralConfig, Phi3Config, Qwen3Config

from kvmem.errors import CapacityError, ConfigError, ModelError
from kvmem.graph.attention import kernels
from kvmem.graph.weights import check_covered
from tests.graph.conftest import prompt_of, stored
from tests.tiny import copy_of, pairs, same_bits

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
def test_lengths_about_a_buckets_edge(open_engine, eager, place, new):
    fast = open_engine()
    prompt = prompt_of(0, new)
    assert along(fast, eager, prompt, None, 3) < place.tolerance


@pytest.mark.parametrize("new", [1, 7, 8, 9, 64, 65, 167, 168])
def test_lengths_behind_a_memory(open_engine, eager, place, new):
    fast = open_engine()
    memory, item = stored(fast, TEXTS[0])
    held = item.metadata.tokens.token_ids
    prompt = type(prompt_of(0, 1))(held, prompt_of(0, new).query_ids)
    cache = memory.get_cache(item.kv_cache_id)
    before = copy_of(item) if place.dtype == torch.float32 else None
    for _ in range(2):  # the second finds the memory in place
        assert along(fast, eager, prompt, cache, 3) < place.tolerance
    assert before is None or same_bits(item, before)


def test_one_graph_serves_every_memory(open_engine, eager, place):
    fast = open_engine()
    memory, first = stored(fast, TEXTS[0])
    second = memory.extract(TEXTS[1][:200])
    memory.add(second)
    for item in (first, second, first, second):
        assert same_answer(fast, memory, item, eager) < place.tolerance


@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_memories_in_turn(open_engine, eager, place, buffers):
    fast = open_engine(buffers=buffers)
    memory, first = stored(fast, TEXTS[0])
    items = [first, *memory.extract(TEXTS[1:])]
    memory.add(items[1:])
    for i in (0, 1, 0, 2, 3, 3, 1, 0, 2):
        assert same_answer(fast, memory, items[i], eager, tokens=3) < place.tolerance
    assert len(fast.engine.seats) <= buffers


def test_a_memory_in_place_is_not_copied_again(open_engine):
    fast = open_engine()
    memory, item = stored(fast, TEXTS[0])
    length = item.metadata.token_count
    buffer = fast.engine._seat_for(item.kv_cache).buffer
    assert buffer.place(item.kv_cache, length) == length
    assert buffer.place(item.kv_cache, length) == 0
    buffer.written_from(length - 5)
    assert buffer.place(item.kv_cache, length) == 5
    other = memory.extract(TEXTS[1])
    assert buffer.place(other.kv_cache, 10) == 10


def test_a_shortened_prefix_leaves_the_memory_usable(open_engine, eager, place):
    """A query that breaks the prefix overwrites the memory's last rows in the buffer: they are placed again."""
    fast = open_engine(buffers=1)
    memory, item = stored(fast, TEXTS[0])
    ids = item.metadata.tokens.token_ids
    shortened = type(prompt_of(0, 1))(ids[:-6], prompt_of(0, 20).query_ids)
    assert along(fast, eager, shortened, memory.get_cache(item.kv_cache_id), 2) < place.tolerance
    assert same_answer(fast, memory, item, eager) < place.tolerance


def test_answers_take_turns_in_one_buffer(open_engine):
    """Streams advanced token by token in turn: each takes its rows along when another sits down."""
    fast = open_engine(buffers=1)
    memory, item = stored(fast, TEXTS[0])
    other = memory.extract(TEXTS[1])
    memory.add(other)
    asked = [(QUERY, item), ("Why?", item), (QUERY, other), ("Name one exception.", None)]

    def lend(of):
        return None if of is None else memory.get_cache(of.kv_cache_id)

    alone = [fast.generate(query, lend(of), 12).token_ids for query, of in asked]
    streams = [fast.stream(query, lend(of), 12) for query, of in asked]
    together: list[list[int]] = [[] for _ in asked]
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
    assert [seat.answer for seat in fast.engine.seats].count(answer) == 1
    del answer
    assert all(seat.answer is None for seat in fast.engine.seats)
    memory.delete_all()
    del item
    gc.collect()
    assert all(seat.buffer.memory is None or seat.buffer.memory() is None for seat in fast.engine.seats)


def test_eight_queries_behind_one_memory(open_engine):
    fast = open_engine(buffers=1)
    memory, item = stored(fast, TEXTS[0])
    queries = ["Why?", QUERY, "Name it.", "Which?", "How is an error raised, and where?", "When?", "Who?", "a " * 90]
    lent = memory.get_cache(item.kv_cache_id)
    alone = [fast.generate(query, memory.get_cache(item.kv_cache_id), 8) for query in queries]
    together = fast.answer_batch(queries, lent, 8)
    if fast.dtype == torch.float32:
        assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    else:  # a near tie may fall the other way; the first token's logits are compared below
        agree = sum(a.token_ids == b.token_ids for a, b in zip(together, alone, strict=True))
        assert agree >= len(queries) / 2
    assert all(answer.cached_tokens == item.metadata.token_count for answer in together)
    assert len(fast.engine.seats) == 1  # the memory was placed once


@pytest.mark.parametrize("kernel", ["fa3", "torch_flash"])
@pytest.mark.gpu
def test_kernels_agree_with_sdpa(kernel):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    device, dtype = torch.device("cuda"), torch.bfloat16
    if reason := kernels()[kernel].why_not(device, dtype, 128):
        pytest.skip(f"{kernel} {reason}")
    torch.manual_seed(0)
    for batch, new, rows, lengths in (
        (1, 5, 300, [77]),
        (1, 167, 900, [700]),
        (3, 8, 64, [8, 20, 64]),
        (1, 1, 700, [650]),
    ):
        q = torch.randn(batch, new, 8, 128, device=device, dtype=dtype)
        k, v = (torch.randn(batch, 2, rows, 128, device=device, dtype=dtype) for _ in "kv")
        at = torch.tensor(lengths, device=device, dtype=torch.int32)
        for causal in (True, False):
            ours, ours_lse = kernels()[kernel].attend_lse(q, k, v, at, causal)
            exact, exact_lse = kernels()["sdpa"].attend_lse(q.float(), k.float(), v.float(), at, causal)
            assert (ours.float() - exact).abs().max() < 0.03
            assert (ours_lse - exact_lse).abs().max() < 0.03


def test_attention_by_its_parts_is_attention(place):
    """Both kernel calls of SDPA agree, and parts joined by their sums are the whole."""
    sdpa = kernels()["sdpa"]
    torch.manual_seed(0)
    q, (k, v) = torch.randn(2, 6, 4, 16), (torch.randn(2, 2, 40, 16) for _ in "kv")
    lengths = torch.tensor([25, 40], dtype=torch.int32)
    for causal in (True, False):
        torch.testing.assert_close(
            sdpa.attend(q, k, v, lengths, causal), sdpa.attend_lse(q, k, v, lengths, causal)[0], atol=1e-5, rtol=1e-5
        )
    whole = sdpa.attend(q[:1], k[:1], v[:1], lengths[:1], True)
    first, first_lse = sdpa.attend_lse(q[:1], k[:1], v[:1], torch.tensor([12]), False)
    rest, rest_lse = sdpa.attend_lse(q[:1], k[:1, :, 12:], v[:1, :, 12:], torch.tensor([13]), True)
    share = torch.sigmoid(first_lse - rest_lse).transpose(1, 2)[..., None]
    torch.testing.assert_close(first * share + rest * (1 - share), whole, atol=1e-5, rtol=1e-5)


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
        fast.answer_batch(["Why?"], memory.get_cache(item.kv_cache_id), 100)
    with pytest.raises(CapacityError, match="capacity_tokens=100"):
        memory.extract(TEXTS[1])
    assert fast.first_token(prompt_of(0, 100)).cached_tokens == 0  # the last row is as good as any


def refused(config) -> str:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError) as raised:
        check_covered(model)
    assert str(raised.value).endswith("Use backend=huggingface.")
    return str(raised.value)


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "vocab_size": 100, "pad_token_id": 0}  # fmt: skip


def test_other_architectures_are_refused_by_name():
    assert "Phi3ForCausalLM: it covers llama, mistral, qwen2, qwen3" in refused(Phi3Config(**SMALL))
    assert "sliding window of 24 tokens" in refused(MistralConfig(sliding_window=24, **SMALL))
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "this qwen3 has dynamic" in refused(Qwen3Config(rope_parameters=rope, head_dim=16, **SMALL))
    assert "this qwen3 has gelu" in refused(Qwen3Config(hidden_act="gelu", head_dim=16, **SMALL))
    windows = Qwen3Config(use_sliding_window=True, sliding_window=16, max_window_layers=1, head_dim=16, **SMALL)
    assert "sliding window of 16 tokens" in refused(windows)


def test_a_replaced_layer_is_refused(tiny):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(head_dim=16, **SMALL))
    model.model.layers[1].mlp.down_proj = torch.nn.Sequential(model.model.layers[1].mlp.down_proj)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj is a Sequential"):
        check_covered(model)


def test_a_kernel_that_does_not_run_here_is_refused(open_engine, place):
    with pytest.raises(ConfigError, match="Did you mean sdpa"):
        open_engine(attention="spda")
    if place.device == "cpu":
        with pytest.raises(ConfigError, match=r"attention=fa3 does not run here \(fa3: needs a Hopper GPU"):
            open_engine(attention="fa3")


@pytest.mark.slow
def test_compiled_for_all_lengths_at_once(open_engine, eager, place):
    """On a CPU too, where it takes a C++ compiler: one compilation serves every length, answers stay the
    same, and the compiled code makes no copy of a buffer."""
    if place.device != "cpu":
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
        assert along(fast, eager, prompt, memory.get_cache(item.kv_cache_id), 2) < place.tolerance
    frames = torch._dynamo.utils.counters["frames"]["ok"]
    assert frames <= 6  # of any length and of one token, each as an inner and as the last layer


def test_decoding_ahead_is_decoding_step_by_step(open_engine):
    fast = open_engine()
    memory, item = stored(fast, TEXTS[0])
    lent = memory.get_cache(item.kv_cache_id)
    streamed = [token.id for token in fast.stream(QUERY, lent, 24)]
    whole = fast.generate(QUERY, lent, 24)
    assert list(whole.token_ids) == streamed
    stop = whole.token_ids[9]
    logits_V, answer = fast.prefill(fast.split(QUERY, lent), lent)
    first, length = int(logits_V.argmax()), answer.length
    tokens = fast.engine.greedy(answer, first, 23, {stop})
    assert [first, *tokens] == streamed[: streamed.index(stop)]
    assert answer.length == length + 1 + len(tokens)  # what was computed beyond the end token does not count
    # and it can go on from there as if nothing had been computed ahead
    again = fast.decode_one_token(stop, answer)
    assert int(again.argmax()) == streamed[streamed.index(stop) + 1]


def test_decoding_stops_at_the_capacity(open_engine):
    fast = open_engine(capacity_tokens=200)
    logits_V, answer = fast.prefill(prompt_of(0, 190))
    with pytest.raises(CapacityError, match="201 tokens"):
        fast.engine.greedy(answer, int(logits_V.argmax()), 20, set())
    assert len(fast.engine.greedy(fast.prefill(prompt_of(0, 190))[1], 5, 10, set())) == 10
