"""The quantized tiers: exact byte counts, errors within the quantization step, and a mark on every lossy item."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors
import torch

from experiments.bench.quality import score
from kvmem import KVCacheItem
from kvmem.cache.dynamic_cache import layers_of, nbytes
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import BudgetError, ConfigError, StorageError
from kvmem.merge.naive_concat import NaiveConcat
from kvmem.merge.reprefill import Reprefill
from kvmem.scheduler.cost_model import Costs, kv_bytes_a_token
from kvmem.scheduler.scheduler import MemScheduler
from kvmem.tiers.quantized import GROUP, QuantizedStore
from kvmem.tiers.tiered_cache import TieredCache
from tests.helpers.tiny import copy_of, memory_on, pairs, same_bits
from tests.scheduler.test_scheduler import MEMORIES, QUERY, use

GB = 1 << 30
SCHEMES = ("int8", "int4")


@pytest.fixture(scope="module")
def built(qwen3: HFBackend) -> list[KVCacheItem]:
    return [qwen3.build(memory) for memory, _ in pairs(3, 700)]


def payload_bytes(path: Path) -> int:
    with safetensors.safe_open(path, "pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 - it is not a dictionary


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_bytes_are_counted_exactly(
    qwen3: HFBackend, built: list[KVCacheItem], tmp_path: Path, scheme: str
) -> None:
    tier = f"disk_{scheme}"
    items = TieredCache(qwen3, {"ram": GB, tier: GB}, tmp_path)
    for item in built:
        items.put(item, "ram")
    used = 0
    for item in built:
        assert items.move(item.kv_cache_id, tier)
        used = sum(payload_bytes(path) for path in tmp_path.glob(f"{scheme}/*.safetensors"))
        assert items.used_bytes()[tier] == used
        assert items.nbytes(item.kv_cache_id) == items.size(tier, item.metadata.token_count)
    assert used < (0.4 if scheme == "int8" else 0.25) * sum(nbytes(item.kv_cache) for item in built)
    assert items.used_bytes()["ram"] == 0
    assert items.move(built[0].kv_cache_id, "ram") and items.drop(built[1].kv_cache_id)
    assert items.used_bytes()["ram"] == nbytes(built[0].kv_cache)
    items.close()

    items = TieredCache(qwen3, {tier: GB}, tmp_path)
    assert items.ids() == [built[2].kv_cache_id] and items.metadata(built[2].kv_cache_id).lossy == scheme
    assert items.used_bytes()[tier] == items.size(tier, built[2].metadata.token_count)
    items.close()
    items = TieredCache(qwen3, {tier: items.size(tier, built[2].metadata.token_count) - 1}, tmp_path)
    assert "over the tier's" in items.refused[built[2].kv_cache_id]
    with pytest.raises(BudgetError):
        items.put(built[2], tier)
    items.close()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_error_of_a_number_is_at_most_half_a_step(
    qwen3: HFBackend, built: list[KVCacheItem], tmp_path: Path, scheme: str
) -> None:
    place = QuantizedStore(qwen3, tmp_path, scheme)
    place.put(built[0])
    steps = 2 ** (8 if scheme == "int8" else 4) - 1
    pairs_of = zip(layers_of(built[0].kv_cache), layers_of(place.read(built[0].kv_cache_id).kv_cache), strict=True)
    for (keys, values), (read_keys, read_values) in pairs_of:
        assert read_keys.shape == keys.shape and read_keys.dtype == keys.dtype
        for tensor, read, dim in ((keys, read_keys, 2), (values, read_values, 3)):
            for part, read_part in zip(tensor.split(GROUP, dim), read.split(GROUP, dim), strict=True):
                step = (part.amax(dim, keepdim=True) - part.amin(dim, keepdim=True)) / steps
                assert ((part - read_part).abs() <= 0.51 * step + 1e-6).all()
        assert not torch.equal(keys, read_keys)
    place.close()


def test_the_lossy_mark_stays_with_the_item(qwen3: HFBackend, built: list[KVCacheItem], tmp_path: Path) -> None:
    memory = memory_on(qwen3)
    items = TieredCache(qwen3, {"ram": GB, "disk": GB, "disk_int8": GB, "disk_int4": GB}, tmp_path)
    id_ = built[0].kv_cache_id
    items.put(built[0], "ram")
    marks = []
    for tier in ("disk", "disk_int8", "ram", "disk", "disk_int4", "ram"):
        assert items.move(id_, tier)
        with items.use(id_) as item:
            assert item.metadata.lossy == items.metadata(id_).lossy
            marks.append(item.metadata.lossy)
    assert marks == ["", "int8", "int8", "int8", "int8, int4", "int8, int4"]
    with items.use(id_) as item:
        memory.add([item, built[1]])
    items.close()

    memory.dump(tmp_path / "dumped")
    again = memory_on(qwen3)
    again.load(tmp_path / "dumped")
    assert [item.metadata.lossy for item in again.get_all()] == ["int8, int4", ""]
    answer = qwen3.generate(QUERY, again.get_cache(id_), 4)
    assert answer.lossy == "int8, int4" and answer.cached_tokens > 50
    assert qwen3.generate(QUERY, again.get_cache(built[1].kv_cache_id), 4).lossy == ""
    both = again.get_all()
    assert qwen3.view(both, NaiveConcat(), "\n\n").lossy == "int8, int4"
    assert qwen3.view(both, Reprefill(), "\n\n").lossy == "", "computed again"
    turns = ({"role": "system", "content": built[0].metadata.source_text}, {"role": "user", "content": "Why?"})
    assert qwen3.build(turns, base=both[0]).metadata.lossy == "int8, int4"


def test_the_file_of_an_exact_item_has_no_lossy_mark(
    qwen3: HFBackend, built: list[KVCacheItem], tmp_path: Path
) -> None:
    memory = memory_on(qwen3)
    memory.add(built[1])
    with safetensors.safe_open(memory.dump(tmp_path), "pt") as file:
        (entry,) = json.loads(file.metadata()["manifest"])["items"]
    assert "lossy" not in entry["metadata"]


def test_a_scheduler_explains_and_counts_quantized_memories(qwen3: HFBackend, tmp_path: Path) -> None:
    costs = Costs(0.001, 1e-2, 0.0, kv_bytes_a_token(qwen3))
    tokens = max(len(qwen3.template.memory_tokens(memory.memory).token_ids) for memory in MEMORIES[:2])
    sizes = TieredCache(qwen3, {"disk_int8": GB}, tmp_path / "sizes")
    budget = 2 * sizes.size("disk_int8", tokens)
    assert budget < 2 * tokens * kv_bytes_a_token(qwen3), "less than the two take unquantized"
    scheduler = MemScheduler(memory_on(qwen3), "benefit_per_byte", {"disk_int8": budget}, tmp_path, costs)
    exact = [scheduler.answer(QUERY, [memory], 8) for memory in MEMORIES[:2]]
    for memory in MEMORIES[:2]:
        use(scheduler, memory, 8)
    while scheduler.tick():
        pass
    assert scheduler.index.tiers() == {"m0": "disk_int8", "m1": "disk_int8"}
    assert scheduler.items.used_bytes()["disk_int8"] <= budget
    for memory, before in zip(MEMORIES[:2], exact, strict=True):
        answer = scheduler.answer(QUERY, [memory], 8)
        assert before.lossy == "" and answer.lossy == "int8" and answer.cached_tokens > 50
        assert answer.prompt_tokens == before.prompt_tokens
    why = scheduler.explain("m0")
    assert "is in disk_int8." in why and "; lossy: int8; loaded when wanted" in why
    scheduler.close()


@pytest.mark.parametrize("at", [100, 0.5, -1])
def test_a_flipped_bit_is_refused(qwen3: HFBackend, built: list[KVCacheItem], tmp_path: Path, at: float) -> None:
    items = TieredCache(qwen3, {"disk_int4": GB}, tmp_path)
    items.put(built[0], "disk_int4")
    (path,) = tmp_path.glob("int4/*.safetensors")
    data = bytearray(path.read_bytes())
    data[int(at * len(data)) if isinstance(at, float) else at] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(StorageError, match=r"Build the memory again|manifest"), items.use(built[0].kv_cache_id):
        pass
    items.close()


def test_exact_tiers_beside_a_quantized_one_keep_every_bit(
    qwen3: HFBackend, built: list[KVCacheItem], tmp_path: Path
) -> None:
    items = TieredCache(qwen3, {"ram": GB, "disk": GB, "disk_int8": GB}, tmp_path)
    before = copy_of(built[1])
    items.put(built[0], "disk_int8")
    items.put(built[1], "ram")
    assert items.move(built[1].kv_cache_id, "disk")
    with items.use(built[1].kv_cache_id) as item:
        assert same_bits(item, before) and item.metadata.lossy == ""
    items.close()


def test_unsupported_models_and_missing_folders_are_refused(
    sliding: HFBackend, qwen3: HFBackend, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="'disk_int8' covers full attention only"):
        TieredCache(sliding, {"disk_int8": GB}, tmp_path)
    with pytest.raises(ConfigError, match="'disk_int4' needs a folder"):
        TieredCache(qwen3, {"disk_int4": GB})
    with pytest.raises(ConfigError, match="disk_int4, disk_int8"):
        TieredCache(qwen3, {"disk_int3": GB}, tmp_path)


@pytest.mark.parametrize("text", ["one", "one two", "one two three", " ".join(["one two three four"] * 40)])
def test_likelihood_needs_64_tokens(qwen3: HFBackend, text: str) -> None:
    """The reference is a forward pass over the whole prompt without a cache."""
    item = qwen3.build(text)
    tokens = item.metadata.tokens
    scored = min(64, len(tokens.body_ids) // 2)
    by_cache = score(qwen3, item)
    found = by_cache and by_cache.nll
    if scored < 2:
        assert found is None
        return
    assert scored == 64, "the long text"
    ids = torch.tensor(tokens.token_ids[: tokens.body_end])
    with torch.inference_mode():
        likely_TV = qwen3.model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
    of_each = -likely_TV[:-1].gather(1, ids[1:, None])[-64:]
    assert of_each.numel() == 64 and found == pytest.approx(float(of_each.mean()), rel=1e-5)


def test_likelihood_with_a_sliding_window_is_refused(sliding: HFBackend) -> None:
    item = sliding.build(pairs(1, 900, seed=3)[0][0])
    with pytest.raises(ConfigError, match="full attention"):
        score(sliding, item)
