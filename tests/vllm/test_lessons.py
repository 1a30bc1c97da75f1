"""How a connector saves what its learner chooses, without an engine: on two ranks, behind failures, and not twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvmem.cache import KVCacheItem, dynamic_cache
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import StorageError
from kvmem.storage import ItemManifest, SafetensorsFile
from tests.helpers.tiny import CPU, pairs
from tests.vllm.conftest import skip_without_vllm

STEP = 32


class Blocks:
    """Counts references on blocks, as vLLM's pool does."""

    def __init__(self) -> None:
        self.blocks = list(range(100))
        self.references = [0] * 100

    def touch(self, blocks: list[int]) -> None:
        for block in blocks:
            self.references[block] += 1

    def free_blocks(self, blocks: list[int]) -> None:
        for block in blocks:
            self.references[block] -= 1


@pytest.fixture
def item(qwen3: HFBackend) -> KVCacheItem:
    return qwen3.build(pairs(1, 900, seed=5)[0][0])


@pytest.fixture
def lessons(qwen3: HFBackend, tmp_path: Path) -> Any:
    """A learner that takes what came twice, on an engine of two ranks with blocks of 32 tokens."""
    skip_without_vllm()
    from kvmem.engines.vllm.connector import learner_of
    from kvmem.engines.vllm.connector.block_pins import BlockPins
    from kvmem.engines.vllm.connector.counts import Counts
    from kvmem.engines.vllm.connector.lessons import Lessons

    learner = learner_of({"after": 2}, tmp_path, qwen3.fingerprint, STEP)
    learner.prefilled(100, 0, 1.0)
    pins = BlockPins(1)
    pins.pool = Blocks()
    return Lessons(tmp_path, qwen3.fingerprint, qwen3.model_config, learner, 2, STEP, pins, Counts(tmp_path))


def ordered(lessons: Any, token_ids: tuple[int, ...]) -> Any:
    """The save of a prompt that comes for the second time, computed in two steps."""
    blocks = len(token_ids) // STEP + 1
    for request in ("first", "second"):
        lessons.watch(request, "acme", token_ids, 0)
        lessons.allocated(request, list(range(blocks - 1)))
        assert not lessons.plan({request: 0}, {request: STEP}, False), "its blocks are not full yet"
        lessons.more_blocks(request, [blocks - 1])
        saves = lessons.plan({request: STEP}, {request: len(token_ids) - STEP}, False)
        lessons.finished(request)
        assert len(saves) == (request == "second")
    return saves[0]


def write_part(qwen3: HFBackend, item: KVCacheItem, save: Any, folder: Path, rank: int) -> None:
    """What a rank writes: its half of the heads."""
    from kvmem.engines.vllm.connector.protocol import part_name

    entry = ItemManifest.model_validate_json(save.item)
    layers = []
    for keys, values in dynamic_cache.layers_of(item.kv_cache):
        half = keys.shape[1] // 2
        layers.append(
            tuple(each[:, rank * half : (rank + 1) * half, : save.end].contiguous() for each in (keys, values))
        )
    cache = dynamic_cache.from_layers(layers, qwen3.model_config)
    part = KVCacheItem(cache, entry.metadata, entry.kv_cache_id)
    SafetensorsFile().dump(folder / part_name(save.name, rank, 2), [part])


def test_the_ranks_parts_become_one_memory_and_the_blocks_are_free_again(
    qwen3: HFBackend, item: KVCacheItem, lessons: Any, tmp_path: Path
) -> None:
    from kvmem.engines.vllm.connector.background_saves import SaveDone
    from kvmem.engines.vllm.connector.counts import LEARNED
    from kvmem.engines.vllm.connector.protocol import MEMORY_NAME, NO_LEASE, digest

    token_ids = item.metadata.tokens.token_ids
    save = ordered(lessons, token_ids)
    assert (save.start, save.end) == (0, len(token_ids) // STEP * STEP)
    references = lessons.pins.pool.references
    assert sum(references) == len(save.block_ids) == save.end // STEP
    lessons.watch("third", "acme", token_ids, 0)
    assert not lessons.pending, "one prefix at a time"
    for rank in range(2):
        write_part(qwen3, item, save, tmp_path, rank)
        lessons.record([], [SaveDone(save.name, False), SaveDone(save.name, True, 0.1)])
        assert sum(references) == (len(save.block_ids) if rank == 0 else 0)
    while lessons.saving is not None:
        lessons.step_ended()
    (path,) = tmp_path.glob("*.safetensors*")
    parts = MEMORY_NAME.fullmatch(path.name)
    assert parts is not None and (parts["namespace"], parts["lease"]) == (digest("acme"), NO_LEASE)
    (stored,) = SafetensorsFile().load(path, qwen3.fingerprint, qwen3.model_config, CPU)
    assert stored.metadata.tokens.token_ids == token_ids[: save.end] and stored.metadata.namespace == "acme"
    for (keys, values), (expected_keys, expected_values) in zip(
        dynamic_cache.layers_of(stored.kv_cache), dynamic_cache.layers_of(item.kv_cache), strict=True
    ):
        assert torch.equal(keys, expected_keys[:, :, : save.end])
        assert torch.equal(values, expected_values[:, :, : save.end])
    assert lessons.counts.totals[LEARNED] == 1 and lessons.learner.nbytes == stored.metadata.kv_bytes


def test_a_rank_that_fails_leaves_nothing_behind(
    qwen3: HFBackend, item: KVCacheItem, lessons: Any, tmp_path: Path
) -> None:
    from kvmem.engines.vllm.connector.background_saves import BackgroundSaves
    from kvmem.engines.vllm.connector.counts import LEARNED, NOT_LEARNED

    def full(_: object) -> None:
        raise StorageError("No space left on device.")

    def broken() -> KVCacheItem:
        raise StorageError("The device is lost.")

    save = ordered(lessons, item.metadata.tokens.token_ids)
    write_part(qwen3, item, save, tmp_path, 0)
    for copied, write in ((lambda: item, lambda _: None), (lambda: item, full)):
        saves = BackgroundSaves()
        saves.start(save.name, copied, write)
        saves.stop()
        lessons.record([], saves.take_done())
    assert lessons.saving is None and sum(lessons.pins.pool.references) == 0
    assert not list(tmp_path.glob("*.safetensors*")) and lessons.learner.nbytes == 0
    assert (lessons.counts.totals[LEARNED], lessons.counts.totals[NOT_LEARNED]) == (0, 1)
    assert "No space left" in lessons.learner.explain("acme", item.metadata.tokens.token_ids)
    saves.start("lost", broken, full)
    saves.stop()
    assert [(done.is_written, done.error) for done in saves.take_done()] == [(False, ""), (True, "The device is lost.")]


def test_nothing_is_learned_beside_keys_and_values_that_are_not_a_prefills(lessons: Any, item: KVCacheItem) -> None:
    token_ids = item.metadata.tokens.token_ids
    lessons.distrust("acme\nlossy")
    for number in range(4):
        lessons.watch(f"distrusted {number}", "acme\nlossy", token_ids, 0)
    assert not lessons.pending
    for number in range(2):
        lessons.watch(f"trusted {number}", "acme", token_ids, 0)
    assert list(lessons.pending) == ["trusted 1"]
    lessons.finished("trusted 1")
    assert not lessons.pending and lessons.learner.nbytes == 0
