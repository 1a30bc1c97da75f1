"""Answers: greedy and sampled, streamed and whole, ended by an end token, refused when too long."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from kvmem.engines.generation import Sampler, Sampling
from kvmem.errors import ConfigError, PromptError
from tests.helpers.tiny import CPU, greedy_by_transformers, memory_on, pairs, with_template

TEXT, QUERY = pairs(1, characters=300, seed=21)[0]


@pytest.fixture(scope="module")
def view(qwen3):
    """Returns a new view of one memory at each call."""
    memory = memory_on(qwen3)
    item = memory.extract(TEXT)
    memory.add(item)
    return lambda: memory.get_cache(item.kv_cache_id)


def test_greedy_without_a_memory_is_transformers(qwen3):
    answer = qwen3.generate(QUERY, max_new_tokens=24)
    assert list(answer.token_ids) == greedy_by_transformers(qwen3, qwen3.split(QUERY).ids, 24)
    assert answer.cached_tokens == 0 and answer.prompt_tokens == len(qwen3.split(QUERY).ids)


def test_sampled_with_a_seed_is_repeatable_and_differs_by_seed(qwen3, view):
    def ask(seed: int):
        return qwen3.generate(QUERY, view(), 16, Sampling(temperature=1.0, top_k=50, top_p=0.95, seed=seed))

    torch.manual_seed(1)
    first = ask(3)
    torch.manual_seed(2)
    torch.rand(5)  # the global generator does not affect it
    assert ask(3) == first
    assert len({ask(seed).token_ids for seed in range(5)}) == 5


def test_sampled_injected_is_sampled_direct(qwen3, view):
    sampling = Sampling(temperature=0.7, seed=5)
    turns = [{"role": "system", "content": TEXT}, {"role": "user", "content": QUERY}]
    injected, direct = qwen3.generate(QUERY, view(), 16, sampling), qwen3.generate(turns, None, 16, sampling)
    assert injected.token_ids == direct.token_ids
    assert injected.cached_tokens > 0 == direct.cached_tokens


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0, top_k=1), Sampling(temperature=1.0, top_p=1e-6)])
def test_sampling_with_one_choice_is_greedy(qwen3, view, sampling):
    assert qwen3.generate(QUERY, view(), 16, sampling) == qwen3.generate(QUERY, view(), 16)


def draws(logits_V: torch.Tensor, count: int = 400, **knobs: float) -> Counter[int]:
    sampler = Sampler(Sampling(**{"temperature": 1.0, "seed": 0, **knobs}), CPU)
    return Counter(sampler.pick(logits_V) for _ in range(count))


def test_top_k_top_p_and_temperature_choose_among_the_right_tokens():
    logits_V = torch.tensor([0.1, 0.4, 0.05, 0.15, 0.3]).log()
    assert set(draws(logits_V)) == {0, 1, 2, 3, 4}
    assert set(draws(logits_V, top_k=2)) == {1, 4}
    assert set(draws(logits_V, top_p=0.8)) == {1, 4, 3}  # 0.4 + 0.3 do not reach 0.8, with 0.15 they do
    assert set(draws(logits_V, top_k=3, top_p=0.5)) == {1, 4}
    hot, usual, cold = (draws(logits_V, temperature=t)[1] for t in (2.0, 1.0, 0.2))
    assert hot < 135 < usual < 200 < 280 < cold  # of 400: 30%, 40% and 79%
    assert set(draws(logits_V, temperature=0.01)) == {1}


@pytest.mark.parametrize(
    "knob",
    [
        {"temperature": -1.0},
        {"temperature": 0.001},  # vLLM would sample with 0.01 instead
        {"temperature": 2.1},  # vLLM refuses more than 2
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"top_k": -1},
        {"top_k": 2**31},
        {"seed": -1},
        {"seed": 2**63},
        {"topk": 3},
    ],
)
def test_sampling_refuses_by_name_what_no_engine_takes(knob):
    with pytest.raises(ConfigError, match=next(iter(knob))):
        Sampling(**knob)


@pytest.mark.parametrize(
    "knob", [{"temperature": 0.01}, {"temperature": 2.0}, {"top_p": 1e-9}, {"top_k": 2**31 - 1}, {"seed": 2**63 - 1}]
)
def test_the_extremes_that_are_allowed_draw_a_token(qwen3, view, knob):
    assert len(qwen3.generate(QUERY, view(), 4, Sampling(**{"temperature": 1.0, **knob})).token_ids) == 4


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0, seed=9)], ids=["greedy", "sampled"])
def test_stream_is_generate_token_by_token(qwen3, view, sampling):
    for tokens in (1, 2, 25, 40):  # random weights answer in broken characters too, cut anywhere
        whole = qwen3.generate(QUERY, view(), tokens, sampling)
        streamed = list(qwen3.stream(QUERY, view(), tokens, sampling))
        assert tuple(token.id for token in streamed) == whole.token_ids
        assert "".join(token.text for token in streamed) == whole.text


def test_stream_holds_back_half_a_character(qwen3):
    """At a high temperature, random weights sometimes give a token that ends inside a character."""
    for seed in range(60):
        sampling = Sampling(temperature=2.0, seed=seed)
        streamed = list(qwen3.stream("Name it.", None, 40, sampling))
        whole = qwen3.generate("Name it.", None, 40, sampling)
        assert "".join(token.text for token in streamed) == whole.text
        held = [i for i, token in enumerate(streamed[:-1]) if not token.text]
        if held:
            break
    else:
        pytest.fail("no answer of 60 had a token inside a character")
    assert not any(token.text.endswith("\N{REPLACEMENT CHARACTER}") for token in streamed[:-1])
    # Where the answer is cut there, its last token gives what generate gives.
    cut = [token.text for token in qwen3.stream("Name it.", None, held[0] + 1, sampling)]
    assert "".join(cut) == qwen3.generate("Name it.", None, held[0] + 1, sampling).text
    assert cut[-1].endswith("\N{REPLACEMENT CHARACTER}")


def test_an_end_token_stops_and_is_not_part_of_the_answer(qwen3, view):
    whole = qwen3.generate(QUERY, view(), 24).token_ids
    stop = whole[10]
    ending = with_template(qwen3, "chat")
    ending.end_tokens = {stop}
    assert ending.generate(QUERY, view(), 24).token_ids == whole[: whole.index(stop)]
    assert tuple(token.id for token in ending.stream(QUERY, view(), 24)) == whole[: whole.index(stop)]


def test_smollm2_ends_its_turn(smollm2):
    assert smollm2.tokenizer.convert_tokens_to_ids("<|im_end|>") in smollm2.end_tokens
    memory = memory_on(smollm2)
    item = memory.extract("The capital of France is Paris. Answer in one short sentence.")
    memory.add(item)
    answer = smollm2.generate("What is the capital of France?", memory.get_cache(item.kv_cache_id), 40)
    assert "Paris" in answer.text and len(answer.token_ids) < 40 and "<|im_end|>" not in answer.text


def test_a_prompt_that_is_too_long_is_refused_with_both_lengths(qwen3, view):
    query = "why " * 8200
    tokens = len(qwen3.template.bare(query).ids)
    with pytest.raises(PromptError, match=f"A text of {tokens} tokens does not fit the model's 8192 positions"):
        qwen3.generate(query)
    behind = len(qwen3.template.split(view().tokens, query).ids)
    with pytest.raises(PromptError, match=f"A text of {behind} tokens does not fit the model's 8192 positions"):
        next(qwen3.stream(query, view()))


def test_no_tokens_and_no_query_are_refused(qwen3, view):
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        qwen3.generate(QUERY, view(), 0)
    with pytest.raises(PromptError, match="query is empty"):
        qwen3.generate(" ", view())
