"""Every merge strategy: what it equals, where it differs, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kvmem.cache.dynamic_cache import KV, layers_of
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import ConfigError, MergeError
from kvmem.merge.base import STRATEGIES as registered
from kvmem.merge.base import merged_tokens, strategy
from kvmem.merge.cacheblend import CacheBlend
from kvmem.merge.legolink import LegoLink
from kvmem.merge.naive_concat import NaiveConcat
from kvmem.merge.reprefill import Reprefill
from kvmem.merge.ropeshift import RopeShift
from kvmem.models.forward import prefill
from tests.helpers.tiny import last_logits, memory_on, pairs, with_template

STRATEGIES = registered.classes()
TEXTS = [text for text, _ in pairs(3, characters=350, seed=11)]
TOLERANCE = 1e-4


def joint_prefill(backend: HFBackend, ids: tuple[int, ...]) -> list[KV]:
    cache = DynamicCache(config=backend.model_config)
    prefill(backend.model, ids, cache)
    return layers_of(cache)


def distance(ours: KV, theirs: KV) -> float:
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def built(backend: HFBackend, count: int = 3):
    items = memory_on(backend).extract(TEXTS[:count])
    separator_ids = backend.template.separator_ids("\n\n")
    return items, separator_ids, merged_tokens(items, separator_ids).token_ids


def test_every_strategy_of_the_package_is_found_by_name():
    assert {cls.__module__.rpartition(".")[2] for cls in STRATEGIES.values()} == {
        "cacheblend",
        "legolink",
        "naive_concat",
        "reprefill",
        "ropeshift",
    }
    assert {"reprefill", "ropeshift", "naiveconcat"} <= set(STRATEGIES)
    assert type(strategy("RopeShift")) is type(strategy("ropeshift")) is RopeShift
    with pytest.raises(ConfigError, match="Did you mean Reprefill"):
        strategy("Refill")


@pytest.mark.parametrize("kind", ["chat", "plain"])
@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_caches_the_merged_ids(qwen3, name, kind):
    backend = with_template(qwen3, kind)
    items, separator_ids, ids = built(backend)
    merged = STRATEGIES[name]().merge(items, separator_ids, backend.model)
    assert merged.get_seq_length() == len(ids)
    assert all(layer.get_seq_length() == len(ids) for layer in merged.layers)
    cache_view = backend.view(items, STRATEGIES[name](), "\n\n")
    assert cache_view.get_seq_length() == len(ids) == len(cache_view.tokens.token_ids)
    assert len(backend.split("Why?", cache_view).memory_ids) >= len(ids) - 1
    # The header is there once, and all the bodies in order.
    text = backend.tokenizer.decode(ids)
    assert text.count("<|im_start|>system") == (kind == "chat")
    assert [text.index(source[:40]) for source in TEXTS] == sorted(text.index(source[:40]) for source in TEXTS)


@pytest.mark.parametrize("name", sorted(name for name, cls in STRATEGIES.items() if cls.exact))
def test_an_exact_strategy_equals_joint_prefill(family, name):
    items, separator_ids, ids = built(family)
    merged = STRATEGIES[name]().merge(items, separator_ids, family.model)
    for ours, theirs in zip(layers_of(merged), joint_prefill(family, ids), strict=True):
        assert distance(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("name", sorted(name for name, cls in STRATEGIES.items() if not cls.exact))
def test_a_strategy_declared_as_not_exact_differs_from_joint_prefill(family, name):
    items, separator_ids, ids = built(family)
    merged = STRATEGIES[name]().merge(items, separator_ids, family.model)
    assert distance(layers_of(merged)[-1], joint_prefill(family, ids)[-1]) > 100 * TOLERANCE


def test_ropeshift_equals_joint_prefill_at_layer_0_where_naive_concat_does_not(family):
    items, separator_ids, ids = built(family)
    joint = joint_prefill(family, ids)[0]
    shifted = layers_of(RopeShift().merge(items, separator_ids, family.model))[0]
    naive = layers_of(NaiveConcat().merge(items, separator_ids, family.model))[0]
    assert distance(shifted, joint) < TOLERANCE
    assert (naive[0] - joint[0]).abs().max() > 100 * TOLERANCE  # keys
    assert (naive[1] - joint[1]).abs().max() < TOLERANCE  # values have no position
    first = items[0].metadata.tokens.body_end
    assert (
        distance(
            (naive[0][..., :first, :], naive[1][..., :first, :]), (joint[0][..., :first, :], joint[1][..., :first, :])
        )
        < TOLERANCE
    )


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_single_memory_is_exact_under_every_strategy(family, name):
    items, separator_ids, ids = built(family, count=1)
    merged = STRATEGIES[name]().merge(items, separator_ids, family.model)
    for ours, theirs in zip(layers_of(merged), joint_prefill(family, ids), strict=True):
        assert distance(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_reprefill_answers_like_the_joined_text(qwen3, kind):
    """In `chat` the separator's tokens may differ from those of the joined text; the ids of both arms do not."""
    backend = with_template(qwen3, kind)
    items, _, _ = built(backend)
    cache_view = backend.view(items, Reprefill(), "\n\n")
    prompt = backend.split("What is common to all?", cache_view)
    assert len(prompt.memory_ids) == cache_view.get_seq_length()
    logits_V, _ = backend.prefill(prompt, cache_view)
    assert (logits_V - last_logits(backend, prompt.ids)).abs().max() < TOLERANCE
    text = backend.tokenizer.decode(prompt.ids)
    assert "\n\n".join(TEXTS) in text and "What is common to all?" in text


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_merge_of_chat_turns_is_refused(qwen3, name):
    memory = memory_on(qwen3, merge=name)
    turns = memory.extract([{"role": "user", "content": "Hello there, who are you?"}])
    memory.add([memory.extract(TEXTS[0]), turns])
    with pytest.raises(MergeError, match=rf"{turns.kv_cache_id} holds chat turns"):
        memory.get_cache([item.kv_cache_id for item in memory.get_all()])


@pytest.mark.parametrize("merge", [CacheBlend(ratio=1), LegoLink(tokens=1000)], ids=lambda merge: merge.name)
def test_recomputing_all_tokens_equals_a_joint_prefill(family, merge):
    items, separator_ids, ids = built(family)
    merged = merge.merge(items, separator_ids, family.model)
    for ours, theirs in zip(layers_of(merged), joint_prefill(family, ids), strict=True):
        assert distance(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("merge", [CacheBlend(), LegoLink()], ids=lambda merge: merge.name)
def test_recomputing_some_tokens_reduces_the_distance_to_a_joint_prefill(family, merge):
    items, separator_ids, ids = built(family)
    joint = joint_prefill(family, ids)

    def away(strategy):
        layers = layers_of(strategy.merge(items, separator_ids, family.model))
        return sum(
            (a - b).pow(2).sum().item()
            for ours, exact in zip(layers, joint, strict=True)
            for a, b in zip(ours, exact, strict=True)
        )

    before = [layer[0].clone() for layer in layers_of(items[1].kv_cache)]
    assert away(merge) < 0.95 * away(RopeShift())
    assert all(torch.equal(a, b) for a, (b, _) in zip(before, layers_of(items[1].kv_cache), strict=True))


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_the_first_separator_attends_to_everything_before_it(qwen3, kind):
    """The first separator follows an exact block, so it is exact. The second one follows a block that is not."""
    backend = with_template(qwen3, kind)
    items, separator_ids, ids = built(backend)
    end = items[0].metadata.tokens.body_end + len(items[0].metadata.tokens.rest_ids) + len(separator_ids)
    for ours, theirs in zip(
        layers_of(RopeShift().merge(items, separator_ids, backend.model)), joint_prefill(backend, ids), strict=True
    ):
        assert all((a - b)[:, :, :end].abs().max() < TOLERANCE for a, b in zip(ours, theirs, strict=True))


def test_an_attention_implementation_without_a_mask_is_refused(qwen3, monkeypatch):
    items, separator_ids, _ = built(qwen3)
    monkeypatch.setattr(qwen3.model.config, "_attn_implementation", "flash_attention_2")
    with pytest.raises(MergeError, match=r"flash_attention_2 has no mask\. Open the model with sdpa or eager"):
        CacheBlend().merge(items, separator_ids, qwen3.model)


@pytest.mark.parametrize("cls", [CacheBlend, LegoLink, NaiveConcat, RopeShift])
def test_a_token_that_left_a_sliding_window_and_is_needed_is_named(sliding, cls):
    items, separator_ids, _ = built(sliding)
    expected = rf"{cls.name} does not cover mistral with these memories.*sliding window of 24 tokens.*Reprefill"
    with pytest.raises(MergeError, match=expected):
        cls().merge(items, separator_ids, sliding.model)


def test_a_sliding_window_is_merged_by_reprefill(sliding):
    items, _, ids = built(sliding)
    cache_view = sliding.view(items, Reprefill(), "\n\n")
    assert cache_view.get_seq_length() == len(ids)
    prompt = sliding.split("Why?", cache_view)
    assert len(prompt.memory_ids) == len(ids)
    logits_V, _ = sliding.prefill(prompt, cache_view)
    assert (logits_V - last_logits(sliding, prompt.ids)).abs().max() < TOLERANCE
