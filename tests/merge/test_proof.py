"""Merges of stored blocks are covered by a measurement on the model, on many families, and refused with the reason."""

from __future__ import annotations

import functools
import inspect
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

from experiments.conformance import tiny_model
from kvmem import KVCacheItem
from kvmem.cache import KV, dynamic_cache
from kvmem.cache.dynamic_cache import layers_of
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import MergeError
from kvmem.merge import merged_tokens, proof_of
from kvmem.merge.cacheblend import CacheBlend
from kvmem.merge.legolink import LegoLink
from kvmem.merge.naive_concat import NaiveConcat
from kvmem.merge.reprefill import Reprefill
from kvmem.merge.ropeshift import RopeShift
from kvmem.models import Loaded, loading
from tests.helpers.tiny import memory_on

TOLERANCE = 1e-4
TEXTS = (
    "The library opens at nine and closes at six, but on a Sunday it opens at ten.",
    "A late book costs ten cents a day, and a lost one costs more.",
    "Guests read in the hall.",
)
"""Each is shorter than the window of the tiny models, 24 tokens, and all are longer together."""
LONG = ("The library opens at nine and closes at six, and it is silent. " * 2, f"{TEXTS[1]} " * 3)
"""Each is longer than the window."""

COVERED = (
    "arcee",  # rotary embeddings of the whole head, in halves
    "cohere",  # parallel blocks, neighbouring dimensions
    "cohere2",  # a sliding window, and layers without positions
    "dbrx",  # mixture of experts
    "deepseek_v2",  # latent attention, complex numbers
    "deepseek_v3",  # latent attention
    "diffllama",
    "ernie4_5",
    "falcon",  # parallel blocks, one KV head
    "gemma2",  # sandwich norms, a sliding window on every second layer
    "gemma3_text",  # two RoPE bases
    "gemma4_text",  # layers of other sizes
    "glm4",  # partial, neighbouring dimensions
    "gpt_neox",  # partial, parallel blocks
    "gpt_oss",  # YaRN, sinks, a sliding window
    "gptj",  # a table of sin and cos
    "granite",
    "llama4_text",  # complex numbers, attention in chunks, layers without positions
    "mistral",
    "mpt",  # ALiBi
    "nanochat",  # rotates in the other sense
    "olmo2",
    "phi3",
    "qwen2_moe",
    "qwen3_moe",
    "smollm3",  # layers without positions
    "stablelm",
)
SHORT = ("llama4_text",)
"""Families that are merged only as long as one of their chunks."""
REFUSED = {
    "bert": r"the keys of layer 0 at another position differ by 0\.\d+ of their size.* no rotary embedding",
    "bloom": "it computes no tokens at a given position",
    "gpt2": r"the keys of layer 0 at another position differ by \d\.?\d* of their size.* no rotary embedding",
    "opt": r"the keys of layer 0 at another position differ by \d\.?\d* of their size.* no rotary embedding",
}


@functools.cache
def opened(architecture: str) -> HFBackend:
    """A tiny model; with a sliding window, under the template `plain`, whose memories are shorter than the window."""
    model = tiny_model(architecture)
    with torch.no_grad():  # smaller weights than other tests want, which amplify rounding less
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(0.4)
    return backend_of(model, "plain" if dynamic_cache.has_sliding_layers(model.config) else "chat")


def backend_of(model: PreTrainedModel, template: str = "chat") -> HFBackend:
    return HFBackend(Loaded(model.eval(), tokenizer(), "random weights"), template)


@functools.cache
def tokenizer():
    return loading.load_tokenizer(loading.PACKAGED)


def built(backend: HFBackend, texts: tuple[str, ...] = TEXTS):
    separator_ids = backend.template.separator_ids("\n\n")
    return memory_on(backend).extract(list(texts)), separator_ids, backend.model


def distance(ours: DynamicCache, theirs: list[KV]) -> float:
    """The largest difference; layers with a window keep the last tokens only."""
    return max(
        float((one - other[..., -one.shape[-2] :, :]).abs().max())
        for pair, other_pair in zip(layers_of(ours), theirs, strict=True)
        for one, other in zip(pair, other_pair, strict=True)
    )


@torch.inference_mode()
def block_attention(model: PreTrainedModel, items: list[KVCacheItem], separator_ids: tuple[int, ...]) -> list[KV]:
    """What RopeShift stands for, by transformers alone and without a rotation: each memory is computed at its place in
    the merge, header first; the tokens between two bodies are computed behind everything before them."""

    def computed(ids: tuple[int, ...], start: int, before: DynamicCache) -> DynamicCache:
        place = {"position_ids": torch.arange(start, start + len(ids))[None]}
        at = place if "position_ids" in inspect.signature(model.forward).parameters else {}
        model(input_ids=torch.tensor([ids]), past_key_values=before, use_cache=True, **at)
        return before

    first = items[0].metadata.tokens
    merged = computed(first.token_ids[: first.body_end], 0, DynamicCache())
    for previous, item in pairwise(items):
        gap = previous.metadata.tokens.rest_ids + separator_ids
        merged = computed(gap, merged.get_seq_length(), merged)
        tokens = item.metadata.tokens
        start = merged.get_seq_length() - tokens.header_tokens
        alone = computed(tokens.token_ids[: tokens.body_end], start, DynamicCache())
        for i, (keys, values) in enumerate(layers_of(alone)):
            merged.update(keys[..., tokens.header_tokens :, :], values[..., tokens.header_tokens :, :], i)
    return layers_of(merged)


@pytest.mark.parametrize("architecture", COVERED)
def test_a_proven_family_is_merged_as_block_attention_and_as_a_joint_prefill(architecture: str) -> None:
    backend = opened(architecture)
    items, separator_ids, model = built(backend, TEXTS[1:] if architecture in SHORT else TEXTS)
    shifted = RopeShift().merge(items, separator_ids, model)
    assert distance(shifted, block_attention(model, items, separator_ids)) < TOLERANCE
    joint = layers_of(Reprefill().merge(items, separator_ids, model))
    assert distance(shifted, joint) > 10 * TOLERANCE, "the two oracles are the same, so this shows nothing"
    assert distance(CacheBlend(ratio=1.0).merge(items, separator_ids, model), joint) < TOLERANCE
    assert distance(LegoLink(tokens=1000).merge(items, separator_ids, model), joint) < TOLERANCE


@pytest.mark.parametrize("architecture", REFUSED)
def test_a_family_is_refused_with_what_was_measured(architecture: str) -> None:
    items, separator_ids, model = built(opened(architecture))
    for merge in (RopeShift(), LegoLink(), CacheBlend()):
        expected = rf"{merge.name} does not cover {architecture}: {REFUSED[architecture]}.*Use merge=Reprefill\."
        with pytest.raises(MergeError, match=expected):
            merge.merge(items, separator_ids, model)
    joint = layers_of(Reprefill().merge(items, separator_ids, model))
    end = items[0].metadata.tokens.body_end + len(separator_ids)
    naive = layers_of(NaiveConcat().merge(items, separator_ids, model))
    for pair, exact in zip(naive, joint, strict=True):
        for one, other in zip(pair, exact, strict=True):
            assert float((one - other)[..., :end, :].abs().max()) < TOLERANCE, "the first separator is exact"


def scaled(**rope: object) -> HFBackend:
    """A tiny Llama with this scaling of its rotary embeddings, trained for 64 of its 128 positions."""
    torch.manual_seed(0)
    rope_parameters = {"rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64, **rope}
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=49152,
        max_position_embeddings=128,
        initializer_range=0.2,
        rope_parameters=rope_parameters,
    )
    return backend_of(AutoModelForCausalLM.from_config(config, dtype=torch.float32), "plain")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear"},
        {"rope_type": "dynamic"},
        {"rope_type": "yarn"},
        {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_a_scaling_of_rotary_embeddings_is_the_models_own(rope: dict[str, object]) -> None:
    backend = scaled(**rope)
    items, separator_ids, model = built(backend)
    shifted = RopeShift().merge(items, separator_ids, model)
    assert distance(shifted, block_attention(model, items, separator_ids)) < TOLERANCE
    items, separator_ids, model = built(backend, LONG)
    total = len(merged_tokens(items, separator_ids).token_ids)
    assert max(item.metadata.token_count for item in items) < 64 < total <= 128
    if rope["rope_type"] != "longrope":
        RopeShift().merge(items, separator_ids, model)
        return
    with pytest.raises(
        MergeError, match=rf"other frequencies in a text of {total} tokens than in one of \d+.*Reprefill"
    ):
        RopeShift().merge(items, separator_ids, model)


@pytest.mark.parametrize(
    "merge", [RopeShift(), LegoLink(tokens=3), CacheBlend(ratio=1.0)], ids=lambda merge: merge.name
)
def test_blocks_longer_than_a_window_are_merged_where_they_hold_what_it_needs(merge) -> None:
    items, separator_ids, model = built(opened("gemma2"), LONG)
    assert all(item.metadata.token_count > 24 for item in items)
    merged = merge.merge(items, separator_ids, model)
    assert merged.get_seq_length() == len(merged_tokens(items, separator_ids).token_ids)
    if merge.name == "CacheBlend":
        assert distance(merged, layers_of(Reprefill().merge(items, separator_ids, model))) < TOLERANCE
    if merge.name == "RopeShift":
        assert distance(merged, block_attention(model, items, separator_ids)) < TOLERANCE


def test_a_token_that_left_the_window_and_is_needed_is_named() -> None:
    items, separator_ids, model = built(opened("gemma2"), LONG)
    with pytest.raises(MergeError, match=r"CacheBlend does not cover gemma2 .*sliding window of 24 tokens.*Reprefill"):
        CacheBlend(ratio=0.2).merge(items, separator_ids, model)
    in_chat = backend_of(model)  # its trailer takes places of the window
    items, separator_ids, model = built(in_chat, LONG)
    with pytest.raises(MergeError, match=r"RopeShift does not cover gemma2 .*sliding window of 24 tokens.*Reprefill"):
        RopeShift().merge(items, separator_ids, model)


def test_chunks_of_attention_that_blocks_would_straddle_are_refused() -> None:
    items, separator_ids, model = built(opened("llama4_text"))
    with pytest.raises(MergeError, match=r"RopeShift does not cover llama4_text: its layers attend in chunks of 24"):
        RopeShift().merge(items, separator_ids, model)


def test_a_model_is_measured_when_its_keys_are_first_moved_and_again_when_it_changed() -> None:
    backend = backend_of(tiny_model("qwen3"))
    items, separator_ids, model = built(backend)
    calls = []
    hook = model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    NaiveConcat().merge(items, separator_ids, model)
    naive = len(calls)
    RopeShift().merge(items, separator_ids, model)
    first = len(calls) - naive
    RopeShift().merge(items, separator_ids, model)
    again = len(calls) - naive - first
    hook.remove()
    assert again < first, "one pass for the separators, and no more probes"
    proof = proof_of(model)
    changed = items[0].metadata.fingerprint.model_copy(update={"weights": "others"})
    assert proof_of(model) is proof is not proof_of(model, changed)
