"""Where a compacted memory can't go, it is refused by name, with the way out; so are models that it is wrong on."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvmem import KVCacheMemoryConfig, MemScheduler
from kvmem.compaction import check_covered
from kvmem.compaction.knorm import Knorm
from kvmem.engines.graph.backend import HFGraphBackend
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import ArgumentError, CompactionError, ConfigError, FingerprintError, MergeError, StorageError
from kvmem.merge import STRATEGIES as MERGES
from kvmem.models.loading import Loaded
from kvmem.storage import opened_item
from kvmem.tiers import TieredCache
from tests.compaction.strategies import Doubled, Uneven
from tests.helpers.architectures import BASE, copy_of_contents, has_contents, tiny_architecture
from tests.helpers.tiny import loaded, memory_on, pairs, with_template

TEXTS = [text for text, _ in pairs(2, characters=300, seed=5)]
QUERY = "Why?"
COVERED = {
    "gpt2": {"n_positions": 512},  # learned positions, and masks that are not named
    "gpt_neox": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16},
    "olmo2": {},
    "phi": {},
}
WITH_ALIBI = ("bloom", "mpt")


def model_of(model_type: str, **fields: object):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**BASE, "vocab_size": 100, **fields})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("model_type", sorted(COVERED))
def test_models_are_covered_without_a_list_of_families(model_type):
    check_covered(model_of(model_type, **COVERED[model_type]), None)


@pytest.mark.parametrize("model_type", WITH_ALIBI)
def test_a_model_whose_scores_depend_on_where_an_entry_stands_is_refused(model_type):
    with pytest.raises(CompactionError, match=f"does not cover {model_type}: .*Extract without compaction"):
        check_covered(model_of(model_type), None)


def test_a_sliding_window_and_states_are_refused(sliding):
    with pytest.raises(CompactionError, match="mistral: its layers have a sliding window"):
        memory_on(sliding).extract(TEXTS[0], compaction="Knorm")
    with pytest.raises(CompactionError, match="do not all keep keys and values"):
        memory_on(tiny_architecture("lfm2")).extract(TEXTS[0], compaction="Knorm")


def test_a_compacted_memory_is_not_compacted_or_extended(qwen3):
    memory = memory_on(qwen3)
    item = memory.extract(TEXTS[0], compaction="Knorm")
    with pytest.raises(CompactionError, match="compacted already, by Knorm"):
        qwen3.compact(item, Knorm())
    turns = [{"role": "user", "content": "One."}, {"role": "assistant", "content": "Two."}]
    base = memory.extract(turns, compaction=Knorm(ratio=0.5))
    with pytest.raises(CompactionError, match="can't be extended"):
        memory.extract([{"role": "user", "content": "Three."}], base=base)


@pytest.mark.parametrize("merge", sorted(MERGES.classes()))
def test_merges_refuse_it_by_name_or_compute_the_texts_again(qwen3, merge):
    memory, plain = (memory_on(qwen3, merge=merge) for _ in range(2))
    whole = memory.extract(TEXTS)
    items = [whole[0], qwen3.compact(whole[1], Uneven())]
    memory.add(items)
    plain.add(whole)
    ids = [item.kv_cache_id for item in items]
    if not MERGES.find(merge).exact:
        with pytest.raises(MergeError, match=f"(?i){merge} joins an entry for each token, and item .* compacted by Un"):
            memory.get_cache(ids)
        return
    answer = qwen3.generate(QUERY, memory.get_cache(ids), 6)
    assert answer == qwen3.generate(QUERY, plain.get_cache([item.kv_cache_id for item in whole]), 6)
    assert answer.lossy == ""


def test_the_fast_engine_refuses_it_by_name(qwen3, tmp_path):
    fast = HFGraphBackend(loaded("tiny"))
    memory, there = memory_on(qwen3), memory_on(fast)
    item = memory.extract(TEXTS[0], compaction="Knorm")
    refusal = "compacted by Knorm .*, and backend=hf_graph does not take compacted memories. Use backend=huggingface"
    with pytest.raises(CompactionError, match=refusal):
        there.add(item)
    memory.add(item)
    memory.dump(tmp_path)
    with pytest.raises(CompactionError, match=refusal):
        there.load(tmp_path)
    with pytest.raises(CompactionError, match="hf_graph does not compact memories"):
        there.extract(TEXTS[0], compaction="Knorm")
    with pytest.raises(CompactionError, match="backend=huggingface"):
        fast.generate(QUERY, memory.get_cache(item.kv_cache_id), 4)


def test_an_engine_that_injects_files_refuses_one(qwen3, tmp_path):
    memory = memory_on(qwen3)
    memory.add(memory.extract(TEXTS[0], compaction="Knorm"))
    path = memory.dump(tmp_path)
    with (
        pytest.raises(CompactionError, match="injects files needs an entry for each token"),
        opened_item(path, qwen3.fingerprint, qwen3.model_config),
    ):
        pass


def test_a_pickle_refuses_it_and_leaves_the_file(qwen3, tmp_path):
    memory = memory_on(qwen3, memory_filename="m.pickle")
    memory.add(memory.extract(TEXTS[0]))
    before = memory.dump(tmp_path).read_bytes()
    memory.add(memory.extract(TEXTS[1], compaction="Knorm"))
    with pytest.raises(StorageError, match=r"compacted by Knorm.*\.safetensors"):
        memory.dump(tmp_path)
    assert (tmp_path / "m.pickle").read_bytes() == before


def test_tiers_keep_it_and_a_quantized_one_refuses_it(qwen3, tmp_path):
    item = memory_on(qwen3).extract(TEXTS[0], compaction=Doubled())
    before = copy_of_contents(item)
    for number, tier in enumerate(("ram", "disk")):
        tiers = TieredCache(qwen3, {tier: 1 << 24}, tmp_path / str(number))
        tiers.put(item, tier)
        with tiers.use(item.kv_cache_id) as kept:
            assert has_contents(kept, before) and kept.metadata == item.metadata
        tiers.close()
    pytest.importorskip("hqq")
    tiers = TieredCache(qwen3, {"disk_int8": 1 << 24}, tmp_path / "int8")
    with pytest.raises(StorageError, match=r"compacted by Doubled .*Use 'disk'"):
        tiers.put(item, "disk_int8")
    tiers.close()


def test_a_scheduler_refuses_a_memory_that_compacts(qwen3):
    with pytest.raises(ConfigError, match="compacts by Knorm, and MemScheduler plans"):
        MemScheduler(memory_on(qwen3, compaction="Knorm"), "lru", {"ram": 1 << 20})


def test_wrong_names_and_kinds(qwen3):
    with pytest.raises(ConfigError, match="Did you mean Knorm"):
        memory_on(qwen3).extract(TEXTS[0], compaction="Know")
    with pytest.raises(ArgumentError, match="compaction has to be CompactionStrategy or str or None, not float"):
        memory_on(qwen3).extract(TEXTS[0], compaction=0.1)
    with pytest.raises(ConfigError, match="compaction is 3"):
        KVCacheMemoryConfig(extractor_llm={"backend": "huggingface", "config": {}}, compaction=3)
    assert KVCacheMemoryConfig(extractor_llm={"backend": "huggingface", "config": {}}, compaction="knorm").compaction


def test_a_configuration_compacts_whatever_is_built(qwen3):
    memory = memory_on(qwen3, compaction=Knorm(ratio=0.5))
    alone, listed = memory.extract(TEXTS[0]), memory.extract(TEXTS)
    assert all(item.metadata.compaction.knobs == {"ratio": 0.5} for item in (alone, *listed))


def test_a_plain_template_compacts_too(qwen3):
    plain = with_template(qwen3, "plain")
    memory = memory_on(plain)
    item = memory.extract(TEXTS[0], compaction="Knorm")
    memory.add(item)
    assert plain.generate(" What is it?", memory.get_cache(item.kv_cache_id), 4).cached_tokens > 0


def test_another_models_memory_is_refused(qwen3):
    other = HFBackend(Loaded(loaded("tiny", seed=1).model, qwen3.tokenizer, "other weights"))
    item = memory_on(other).extract(TEXTS[0])
    with pytest.raises(FingerprintError, match="built by another model"):
        qwen3.compact(item, Knorm())
