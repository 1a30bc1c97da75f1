"""Attention Matching and the strategies that look at queries, against definitions and on a trained model."""

from __future__ import annotations

import math
from itertools import pairwise
from pydoc_data.topics import topics

import pytest
import torch

from kvmem.cache import dynamic_cache
from kvmem.compaction import Memory
from kvmem.compaction.attention_matching import AttentionMatching
from kvmem.compaction.kvzip import KVzip
from kvmem.compaction.least_squares import bounded_least_squares, matching_pursuit
from kvmem.compaction.observed_queries import Behind
from kvmem.compaction.random_choice import RandomChoice
from kvmem.compaction.snapkv import SnapKV
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.engines.huggingface.config import HFConfig
from kvmem.errors import CompactionError
from kvmem.models import prefill
from tests.compaction.reference import logits_with
from tests.helpers.tiny import memory_on, pairs

((TEXT, QUERY),) = pairs(1, characters=400, seed=7)
BOTH = ("fast", "pursuit")
TOLERANCE = 2e-5


def memory_of(backend: HFBackend, item) -> Memory:
    return Memory.of(item, backend.model, backend.repeat_of(item.metadata.tokens))


def off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("search", BOTH)
def test_with_all_entries_it_is_the_memory(family: HFBackend, search):
    item = memory_on(family).extract(TEXT)
    strategy = AttentionMatching(ratio=1.0, search=search)
    for (stored_keys, stored_values), heads in zip(
        dynamic_cache.layers_of(item.kv_cache), strategy.compact(memory_of(family, item)), strict=True
    ):
        for head, kept in enumerate(heads):
            assert torch.equal(kept.keys_ND, stored_keys[0, head])
            assert kept.bias_N is not None and off(kept.bias_N, torch.zeros(len(kept.bias_N))) < TOLERANCE
            assert off(kept.values_ND, stored_values[0, head]) < TOLERANCE
    ids = family.template.split(item.metadata.tokens, QUERY).query_ids
    whole = family.compact(item, strategy)
    assert off(logits_with(family, whole, ids), logits_with(family, item, ids)) < 10 * TOLERANCE


def test_what_is_watched_is_the_models_attention(family: HFBackend):
    """The output that follows from what is watched is that of the layer: the logits of a pass in which every layer's
    attention is replaced by it are those of the model."""
    item = memory_on(family).extract(TEXT)
    memory = memory_of(family, item)
    ids = (*memory.repeat.prompt_ids, *memory.repeat.text_ids)
    shares = []

    def see(layer: int, behind: Behind) -> torch.Tensor:
        keys, values = (tensor[0] for tensor in memory.layers[layer])
        output = []
        for head in range(len(keys)):
            values_ND = torch.cat([values[head], behind.values_HTD[head]])
            parts = list(behind.attention(head, keys[head]))
            shares.extend(part.sum(-1) for part in parts)
            output.append(torch.cat([part @ values_ND for part in parts], dim=1))
        outputs.append(torch.stack(output))
        return outputs[-1]

    outputs: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []
    memory.observe(lambda layer, behind: seen.append(behind.queries_HGTD))
    memory.observe(see)
    assert len(outputs) == len(memory.layers)
    assert outputs[0].shape[2] == len(ids)
    assert all(off(share, torch.ones_like(share)) < 1e-5 for share in shares)

    again: list[torch.Tensor] = []
    memory.observe(lambda layer, behind: (again.append(behind.queries_HGTD), see(layer, behind))[1])
    # With layer 0's attention replaced, layer 1 has the queries that it has without: the replacement is the same.
    assert all(off(one, other) < 1e-3 * float(one.abs().max()) for one, other in zip(seen, again, strict=True))


def test_kvzip_takes_the_largest_attention_over_all_heads_together(qwen3):
    item = memory_on(qwen3).extract(TEXT)
    memory = memory_of(qwen3, item)
    scores = torch.stack(list(KVzip().scores(memory)))
    chosen = KVzip(ratio=0.25).chosen(memory)
    lengths = [len(at) for heads in chosen for at in heads]
    assert sum(lengths) == math.ceil(0.25 * scores.numel()) and len(set(lengths)) > 1
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for layer, heads in enumerate(chosen):
        for head, at in enumerate(heads):
            kept[layer, head, at] = True
    forced = torch.zeros_like(kept).scatter(-1, scores.argmax(-1, keepdim=True), True)
    assert scores[kept & ~forced].min() >= scores[~kept].max()
    assert all(len(at) == 1 for heads in KVzip(ratio=1e-6).chosen(memory) for at in heads)


def test_kvzips_scores_by_attention_in_plain_steps(qwen3):
    """One forward pass over memory and repetition with transformers' own attention weights."""
    eager = HFBackend.open(HFConfig("random:tiny", device="cpu", dtype="float32", attn_implementation="eager"))
    watched = HFBackend.open(HFConfig("random:tiny", device="cpu", dtype="float32", attn_implementation="sdpa"))
    item = memory_on(watched).extract(TEXT)
    memory = memory_of(watched, item)
    ids = (*memory.token_ids, *memory.repeat.prompt_ids, *memory.repeat.text_ids)
    with torch.inference_mode():
        weights = eager.model(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
    for layer, scores_HT in enumerate(KVzip().scores(memory)):
        to_memory = weights[layer][0, :, memory.tokens :, : memory.tokens]
        expected = to_memory.unflatten(0, (len(scores_HT), -1)).amax(dim=(1, 2))
        assert off(scores_HT, expected) < 1e-5


def test_snapkv_pools_the_mean_attention(qwen3):
    memory = memory_of(qwen3, memory_on(qwen3).extract(TEXT))
    alone, pooled = (list(SnapKV(pool=pool).scores(memory))[1][0] for pool in (1, 3))
    assert off(pooled[5], alone[4:7].mean()) < 1e-4 * float(alone.max())


def test_an_attention_that_cant_be_watched_is_refused():
    eager = HFBackend.open(HFConfig("random:tiny", device="cpu", dtype="float32", attn_implementation="eager"))
    with pytest.raises(CompactionError, match="attn_implementation=eager can't be watched"):
        memory_on(eager).extract(TEXT, compaction="KVzip")


def test_a_memory_that_leaves_no_positions_is_refused(qwen3):
    memory = memory_of(qwen3, memory_on(qwen3).extract(TEXT))
    positions = qwen3.model_config.max_position_embeddings
    layers = [(keys[:, :, :1].expand(-1, -1, positions, -1), values) for keys, values in memory.layers]
    long = Memory(layers, memory.token_ids, memory.model, memory.repeat)
    with pytest.raises(CompactionError, match=r"0 positions\. Use Knorm, KeyDiff or StreamingLLM"):
        KVzip().scores(long)


def problem(columns: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mass = (3 * torch.randn(200, columns, generator=generator)).exp()
    mass = mass / mass.amax(dim=1, keepdim=True)
    return mass, mass.sum(dim=1)


@pytest.mark.parametrize("seed", range(3))
def test_bounded_least_squares_is_that_of_scipy(seed):
    optimize = pytest.importorskip("scipy.optimize")
    mass, target = problem(seed=seed)
    ours = bounded_least_squares(mass[:, :8], target, 0.05, 20.0)
    theirs = optimize.lsq_linear(mass[:, :8].double().numpy(), target.double().numpy(), (0.05, 20.0), tol=1e-12)
    error = float((mass[:, :8].double() @ ours - target).square().sum())
    assert error <= 2 * theirs.cost * (1 + 1e-6)
    assert ours.min() >= 0.05 and ours.max() <= 20.0


@pytest.mark.parametrize("seed", range(3))
def test_the_error_of_matching_pursuit_does_not_grow_with_the_entries(seed):
    mass, target = problem(seed=seed)
    errors = []
    for count in range(1, 25):
        at, weights = matching_pursuit(mass, target, count, 1e-12, math.exp(7))
        assert len(set(at.tolist())) == count and weights.min() >= 1e-12
        errors.append(float((mass[:, at].double() @ weights - target).norm()))
    every_refit = errors[7::8]  # supports of whole refits are nested; between them the last columns come in otherwise
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(every_refit))
    assert errors[-1] < 0.01 * errors[0]


@pytest.fixture(scope="module")
def trained(smollm2):
    """A memory of documentation of about 300 tokens on a trained model, and what follows it."""
    item = memory_on(smollm2).extract(topics["assert"][:1200])
    return item, smollm2.template.split(item.metadata.tokens, "What does the assert statement do?").query_ids


@torch.inference_mode()
def outputs_behind(backend: HFBackend, item, ids) -> list[torch.Tensor]:
    """The output of each layer's attention for these tokens behind the item."""
    found: list[torch.Tensor] = []
    layers = backend.model.model.layers
    hooks = [layer.self_attn.register_forward_hook(lambda _, __, out: found.append(out[0])) for layer in layers]
    try:
        prefill(backend.model, ids, dynamic_cache.view_of(item.kv_cache, item.metadata.tokens, backend.model_config))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def error_of(backend: HFBackend, item, ids, strategy) -> float:
    """How far the attention output is off behind the compacted memory, as a share of its size, over all layers."""
    right = outputs_behind(backend, item, ids)
    ours = outputs_behind(backend, backend.compact(item, strategy), ids)
    return sum(float((a - b).norm() / b.norm()) for a, b in zip(ours, right, strict=True)) / len(right)


def test_on_a_trained_model_matching_is_better_than_choosing_and_choosing_than_chance(smollm2, trained):
    item, ids = trained
    errors = {
        strategy: error_of(smollm2, item, ids, strategy_of)
        for strategy, strategy_of in {
            "random": RandomChoice(ratio=0.1),
            "kvzip": KVzip(ratio=0.1),
            "fast": AttentionMatching(ratio=0.1),
            "pursuit": AttentionMatching(ratio=0.1, search="pursuit"),
        }.items()
    }
    assert errors["kvzip"] < errors["random"]
    assert errors["fast"] < errors["kvzip"]
    assert errors["pursuit"] < errors["random"]
