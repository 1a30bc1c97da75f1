"""What the default format adds: any safetensors reader opens it, and a load makes no second copy in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from experiments.measurement.process_memory import peak_extra_bytes
from kvmem.cache.dynamic_cache import layers_of, nbytes
from kvmem.cache.items import KVCacheItem
from kvmem.errors import DamagedFileError
from kvmem.storage.safetensors_file import ALIGN_BYTES, LENGTH_BYTES
from tests.helpers import stored


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory.safetensors"


def test_the_safetensors_package_reads_the_file(path: Path) -> None:
    items = [stored.item("a"), stored.item("b", 3, 1, torch.bfloat16)]
    stored.dump(path, *items)
    with safe_open(path, "pt") as file:
        assert [entry["kv_cache_id"] for entry in json.loads(file.metadata()["manifest"])["items"]] == ["a", "b"]
        for i, item in enumerate(items):
            for layer, (keys, values) in enumerate(layers_of(item.kv_cache)):
                assert file.get_tensor(f"{i}.{layer}.k").equal(keys)
                assert file.get_tensor(f"{i}.{layer}.v").equal(values)


def test_the_tensors_are_aligned(path: Path) -> None:
    stored.dump(path, stored.item())
    header_bytes = int.from_bytes(path.read_bytes()[:LENGTH_BYTES], "little")
    assert (LENGTH_BYTES + header_bytes) % ALIGN_BYTES == 0
    assert layers_of(stored.load(path)[0].kv_cache)[0][0].data_ptr() % ALIGN_BYTES == 0


def test_a_safetensors_file_of_another_program_is_refused(path: Path) -> None:
    save_file({"weight": torch.ones(64)}, path, metadata={"format": "pt"})
    with pytest.raises(DamagedFileError, match="does not start like a memory of kvmem"):
        stored.load(path)


def test_a_load_makes_no_second_copy_in_memory(path: Path) -> None:
    caches = [stored.item(tokens=250_000).kv_cache for _ in range(4)]
    no_ids = stored.metadata(0, 0).tokens.model_copy(update={"header_tokens": 0})  # a million of them take 40 MB
    known = stored.metadata(0, nbytes(caches[0])).model_copy(update={"tokens": no_ids})
    items = [KVCacheItem(cache, known, str(i)) for i, cache in enumerate(caches)]
    total = sum(nbytes(item.kv_cache) for item in items)
    stored.dump(path, stored.item())  # warms up
    _, dump_bytes = peak_extra_bytes(lambda: stored.dump(path, *items))
    loaded, load_bytes = peak_extra_bytes(lambda: stored.load(path))
    assert dump_bytes < 0.1 * total
    assert load_bytes < 0.1 * total
    assert all(map(stored.same, loaded, items))
