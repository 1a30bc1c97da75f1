"""Tiers keep every bit, never exceed a budget, and keep an item that is in use."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmem import KVCacheItem
from kvmem.cache import dynamic_cache
from kvmem.cache.dynamic_cache import nbytes
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import BudgetError, ConfigError, DuplicateMemoryError, StorageError, UnknownMemoryError
from kvmem.models.loading import load
from kvmem.tiers.tiered_cache import TieredCache
from tests.helpers.tiny import copy_of, pairs, same_bits

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(qwen3: HFBackend) -> list[KVCacheItem]:
    """Six real items of different sizes."""
    return [qwen3.build(memory) for memory, _ in pairs(6, 300)]


def test_moves_keep_every_bit(qwen3: HFBackend, built: list[KVCacheItem], tmp_path: Path) -> None:
    items = TieredCache(qwen3, {"ram": 1 << 30, "disk": 1 << 30}, tmp_path)
    before = copy_of(built[0])
    items.put(built[0], "ram")
    for tier in ("disk", "ram", "disk"):
        assert items.move(built[0].kv_cache_id, tier)
        assert items.tier_of(built[0].kv_cache_id) == tier
        assert items.used_bytes() == {"ram": 0, "disk": 0} | {tier: nbytes(built[0].kv_cache)}
        with items.use(built[0].kv_cache_id) as item:
            assert same_bits(item, before) and item.metadata == built[0].metadata
        assert len(list(tmp_path.glob("*.safetensors"))) == (tier == "disk")
    items.close()


def test_a_dropped_item_in_use_stays_until_its_last_use(qwen3: HFBackend, built: list[KVCacheItem]) -> None:
    items = TieredCache(qwen3, {"ram": nbytes(built[0].kv_cache)})
    items.put(built[0], "ram")
    before = copy_of(built[0])
    with items.use(built[0].kv_cache_id) as item:
        assert items.drop(built[0].kv_cache_id) and not items.drop(built[0].kv_cache_id)
        assert items.ids() == []
        with pytest.raises(UnknownMemoryError, match=built[0].kv_cache_id), items.use(built[0].kv_cache_id):
            pass
        assert items.used_bytes()["ram"] == nbytes(built[0].kv_cache)
        with pytest.raises(BudgetError, match="0 left"):
            items.put(built[1], "ram")
        assert same_bits(item, before)
    assert items.used_bytes()["ram"] == 0


def test_an_item_in_use_is_not_moved(qwen3: HFBackend, built: list[KVCacheItem], tmp_path: Path) -> None:
    items = TieredCache(qwen3, {"ram": 1 << 30, "disk": 1 << 30}, tmp_path)
    items.put(built[0], "ram")
    with items.use(built[0].kv_cache_id):
        assert not items.move(built[0].kv_cache_id, "disk")
    assert items.tier_of(built[0].kv_cache_id) == "ram" and items.used_bytes()["disk"] == 0
    items.close()


def test_errors_name_the_way_out(qwen3: HFBackend, built: list[KVCacheItem], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean disk\?"):
        TieredCache(qwen3, {"disc": 1}, tmp_path)
    with pytest.raises(ConfigError, match="Use 'ram'"):
        TieredCache(qwen3, {"gpu": 1})
    with pytest.raises(ConfigError, match="needs a folder"):
        TieredCache(qwen3, {"disk": 1})
    items = TieredCache(qwen3, {"ram": 1 << 30, "disk": 10}, tmp_path)
    items.put(built[0], "ram")
    with pytest.raises(BudgetError, match="'disk' has 10 left"):
        items.move(built[0].kv_cache_id, "disk")
    assert items.used_bytes() == {"ram": nbytes(built[0].kv_cache), "disk": 0}
    assert items.move(built[0].kv_cache_id, "ram")
    with pytest.raises(StorageError, match="another process"):
        TieredCache(qwen3, {"disk": 10}, tmp_path)
    items.close()


def test_the_next_process_restores_the_disk_tier(qwen3: HFBackend, built: list[KVCacheItem], tmp_path: Path) -> None:
    items = TieredCache(qwen3, {"disk": 1 << 30}, tmp_path)
    for item in built[:3]:
        items.put(item, "disk")
    items.close()
    damaged = sorted(tmp_path.glob("*.safetensors"))[0]
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(bytes(data))
    (tmp_path / ".x.safetensors.1.partial").write_bytes(b"cut off")
    items = TieredCache(qwen3, {"disk": 1 << 30}, tmp_path)
    assert list(items.refused) == [damaged.name] and "checksum" in items.refused[damaged.name]
    assert len(items.ids()) == 2 and not list(tmp_path.glob(".*.partial"))
    for item in built[:3]:
        if item.kv_cache_id in items.ids():
            with items.use(item.kv_cache_id) as found:
                assert same_bits(found, copy_of(item))
    items.close()


STEPS = st.lists(
    st.tuples(st.sampled_from(["put", "move", "drop", "use"]), st.integers(0, 5), st.booleans()), max_size=30
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, ram_items=st.floats(0, 4), disk_items=st.floats(0, 4))
def test_accounting_is_exact(
    qwen3: HFBackend, built: list[KVCacheItem], steps: list[tuple[str, int, bool]], ram_items: float, disk_items: float
) -> None:
    """After any sequence of operations, used bytes are those of the tensors and within the budgets; bits are equal."""
    mean = sum(nbytes(item.kv_cache) for item in built) / len(built)
    budgets = {"ram": int(ram_items * mean), "disk": int(disk_items * mean)}
    with tempfile.TemporaryDirectory() as folder:
        items = TieredCache(qwen3, budgets, folder)
        where: dict[int, str] = {}
        for step, index, disk in steps:
            item, tier = built[index], "disk" if disk else "ram"
            size = nbytes(item.kv_cache)
            free = budgets[tier] - sum(nbytes(built[i].kv_cache) for i, at in where.items() if at == tier)
            if step == "drop":
                assert items.drop(item.kv_cache_id) == (where.pop(index, None) is not None)
            elif step == "use" and index in where:
                with items.use(item.kv_cache_id) as used:
                    assert same_bits(used, copy_of(item))
            elif (step == "put") != (index in where) and step in ("put", "move"):
                if where.get(index) != tier and size > free:
                    with pytest.raises(BudgetError):
                        items.put(item, tier) if step == "put" else items.move(item.kv_cache_id, tier)
                else:
                    items.put(item, tier) if step == "put" else items.move(item.kv_cache_id, tier)
                    where[index] = tier
            sums = {"ram": 0, "disk": 0}
            for i, at in where.items():
                sums[at] += nbytes(built[i].kv_cache)
            assert items.used_bytes() == sums and all(sums[tier] <= budgets[tier] for tier in sums)
            assert {item_id: items.tier_of(item_id) for item_id in items.ids()} == {
                built[i].kv_cache_id: at for i, at in where.items()
            }
        items.close()


def test_eight_threads_lose_nothing(qwen3: HFBackend, built: list[KVCacheItem], tmp_path: Path) -> None:
    """8 threads with 2,000 mixed operations; each tier has space for a tenth of the items."""
    torch.set_num_threads(1)
    copies = [KVCacheItem(built[i % 6].kv_cache, built[i % 6].metadata, f"item-{i}") for i in range(40)]
    before = [copy_of(item) for item in built]
    total = sum(nbytes(item.kv_cache) for item in copies)
    budgets = {"ram": total // 10, "disk": total // 10}
    items = TieredCache(qwen3, budgets, tmp_path)
    over: list[dict[str, int]] = []
    wrong: list[str] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(2000):
            index = chance.randrange(40)
            item, tier = copies[index], "disk" if chance.random() < 0.1 else "ram"
            step = chance.random()
            try:
                if step < 0.25:
                    items.put(item, tier)
                elif step < 0.45:
                    items.move(item.kv_cache_id, tier)
                elif step < 0.55:
                    items.drop(item.kv_cache_id)
                else:
                    with items.use(item.kv_cache_id) as used:
                        if not same_bits(used, before[index % 6]):
                            wrong.append(item.kv_cache_id)
            except (BudgetError, DuplicateMemoryError, UnknownMemoryError):
                pass
            used_bytes = items.used_bytes()
            if any(used_bytes[name] > budgets[name] for name in budgets):
                over.append(used_bytes)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not over and not wrong
    sums = {"ram": 0, "disk": 0}
    for item_id in items.ids():
        sums[items.tier_of(item_id)] += nbytes(copies[int(item_id.removeprefix("item-"))].kv_cache)
    assert items.used_bytes() == sums
    assert len(list(tmp_path.glob("*.safetensors"))) == sum(items.tier_of(item_id) == "disk" for item_id in items.ids())
    for item_id in items.ids():
        items.drop(item_id)
    assert items.used_bytes() == {"ram": 0, "disk": 0} and not list(tmp_path.glob("*.safetensors"))
    items.close()


DEMOTE_FOREVER = """
import sys
from tests.helpers.tiny import tiny_backend
from tests.helpers.tiny import pairs
from kvmem.tiers import TieredCache
backend = tiny_backend("qwen3")
items = TieredCache(backend, {"ram": 1 << 30, "disk": 1 << 30}, sys.argv[1])
built = [backend.build(memory) for memory, _ in pairs(6, 300)[:3]]
for item in built:
    items.put(item, "disk")
print("moving", flush=True)
while True:
    for item in built:
        items.move(item.kv_cache_id, "ram")
        items.move(item.kv_cache_id, "disk")
"""


@pytest.mark.parametrize("delay_s", [0.005, 0.05])
def test_a_kill_during_a_demotion_leaves_no_half_written_file(
    qwen3: HFBackend, built: list[KVCacheItem], tmp_path: Path, delay_s: float
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", DEMOTE_FOREVER, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None and child.stdout.readline() == b"moving\n"
    time.sleep(delay_s)
    child.send_signal(signal.SIGKILL)
    child.wait()
    items = TieredCache(qwen3, {"ram": 1 << 30, "disk": 1 << 30}, tmp_path)
    assert items.refused == {} and len(items.ids()) >= 2  # at most one was in RAM alone
    texts = {item.metadata.source_text: item for item in built}
    for item_id in items.ids():
        with items.use(item_id) as item:
            assert same_bits(item, copy_of(texts[item.metadata.source_text]))
    items.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_attention_waits_for_layers_in_transfer() -> None:
    """The item is so large that copies still run when the forward pass begins; stale memory would change the logits."""
    loaded = load("random:qwen3-0.6b", torch.device("cuda"), torch.float32)
    backend = HFBackend(loaded)
    item = backend.build(pairs(1, 12_000)[0][0])
    before = copy_of(item)
    ram = TieredCache(backend, {"ram": nbytes(item.kv_cache)})
    ram.put(item, "ram")
    cache_view = dynamic_cache.view_of(item.kv_cache, item.metadata.tokens, backend.model_config)
    prompt = backend.split("What is it about?", cache_view)
    expected_V, _ = backend.prefill(prompt, cache_view)
    for _ in range(5):
        torch.empty(1 << 28, device="cuda").fill_(float("nan"))  # what a layer that came too late would read
        with ram.use(item.kv_cache_id) as used:
            cache = dynamic_cache.view_of(used.kv_cache, used.metadata.tokens, backend.model_config)
            logits_V, _ = backend.prefill(prompt, cache)
            assert torch.equal(logits_V, expected_V)
            assert same_bits(used, before)
