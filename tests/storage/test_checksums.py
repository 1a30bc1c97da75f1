"""Checksums of regions, and the parallel read to a device, which is tested with a CPU as the device."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmem.cache.dynamic_cache import from_layers, layers_of
from kvmem.cache.items import KVCacheItem
from kvmem.errors import DamagedFileError
from kvmem.storage import checksums, parallel_read, read_head
from kvmem.storage.checksums import REGION_BYTES, RegionHash, Regions
from kvmem.storage.safetensors_file import LENGTH_BYTES, SafetensorsFile, read_header, read_tensors
from tests.helpers import stored

GOLDEN = Path(__file__).parent / "golden/whole_file_checksum.safetensors"
"""An older file, without regions. Keys are 0, 1, 2, ... plus 1,000 for each layer; values are their negatives."""
SMALL = 64
T = TypeVar("T")

bodies = st.binary(max_size=40 * SMALL)
quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _regions(body: bytes) -> Regions:
    hashed = RegionHash(SMALL)
    hashed.update(body)
    return Regions(len(body), SMALL, hashed.digests())


@quick
@given(body=bodies, cuts=st.lists(st.integers(0, 40 * SMALL)))
def test_digests_do_not_depend_on_the_pieces_of_the_body(body: bytes, cuts: list[int]) -> None:
    hashed = RegionHash(SMALL)
    edges = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
    for start, end in pairwise(edges):
        hashed.update(body[start:end])
    each = [xxhash.xxh3_128_digest(body[at : at + SMALL]) for at in range(0, len(body), SMALL)]
    assert list(hashed.digests()) == each
    assert len(_regions(body)) == len(each)
    _regions(body).check_all(memoryview(body), Path("whole"))


@quick
@given(body=st.binary(min_size=1, max_size=40 * SMALL), at=st.integers(0, 1 << 40), bit=st.integers(0, 7))
def test_a_flipped_bit_in_any_region_is_refused_mapped_or_read(tmp_path: Path, body: bytes, at: int, bit: int) -> None:
    regions = _regions(body)
    damaged = bytearray(body)
    damaged[at % len(body)] ^= 1 << bit
    with pytest.raises(DamagedFileError, match="f is damaged: its checksum"):
        regions.check_all(memoryview(damaged), Path("f"))
    with pytest.raises(DamagedFileError, match="f is damaged: its checksum"):
        _staged(tmp_path / "f", damaged, regions, [(0, len(body))])


@quick
@given(body=bodies, cuts=st.lists(st.integers(0, 40 * SMALL), max_size=6))
def test_a_parallel_read_fills_every_span_wherever_regions_end(tmp_path: Path, body: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    spans = list(pairwise(edges))
    parts = _staged(tmp_path / "f", body, _regions(body), spans)
    assert [bytes(part.numpy()) for part in parts] == [body[start:end] for start, end in spans]


def test_a_body_with_all_regions_damaged_is_refused_without_a_deadlock(tmp_path: Path) -> None:
    body = bytes(500 * SMALL)
    wrong = Regions(len(body), SMALL, (_regions(body).digests[0], *(bytes(16),) * 499))
    for _ in range(30):
        with pytest.raises(DamagedFileError):
            within(60, lambda: _staged(tmp_path / "f", body, wrong, [(0, len(body))]))


def test_a_file_truncated_during_the_read_is_refused(tmp_path: Path) -> None:
    body = bytes(range(256)) * SMALL
    with pytest.raises(DamagedFileError):
        _staged(tmp_path / "f", body[:-1], _regions(body), [(0, len(body))])


def test_several_threads_work_on_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    together = threading.Barrier(3, timeout=60)  # one thread alone does not get past it
    checksums.for_each_region(lambda i: together.wait() and None, 9)
    assert checksums.thread_count(1) == 1 and checksums.thread_count(1000) == 3


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[KVCacheItem]]:
    """A file with two items and twelve regions; the border between the items is inside a region."""
    items = [stored.item("a", 60_000), stored.item("b", 33_333, 1)]
    return stored.dump(tmp_path_factory.mktemp("large") / "f.safetensors", *items), items


def test_a_read_file_equals_the_mapped_one_to_the_bit(large: tuple[Path, list[KVCacheItem]]) -> None:
    path, items = large
    assert all(map(stored.same, stored.load(path), items))
    _same_when_staged(path, items)


def test_tensors_of_several_dtypes_share_one_allocation(tmp_path: Path) -> None:
    narrow, wide = torch.arange(3).view(1, 1, 3, 1).to(torch.float8_e4m3fn), torch.arange(3.0).view(1, 1, 3, 1)
    item = KVCacheItem(from_layers([(narrow, wide), (wide, narrow)], stored.CONFIG), stored.metadata(3, 30), "a")
    path = stored.dump(tmp_path / "f.safetensors", item, stored.item("b"))
    _same_when_staged(path, [item, stored.item("b")])


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_each_region_of_a_file_is_checked(large: tuple[Path, list[KVCacheItem]], tmp_path: Path, where: str) -> None:
    content = bytearray(large[0].read_bytes())
    body_at = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
    content[{"first": body_at, "middle": len(content) // 2, "last": -1}[where]] ^= 1
    path = tmp_path / "f.safetensors"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match="checksum"):
        stored.load(path)
    assert read_head(path).token_ids == tuple(range(60_000)), "the header has its own checksum"


def test_whole_regions_cut_off_or_added_are_refused(large: tuple[Path, list[KVCacheItem]], tmp_path: Path) -> None:
    path, content = tmp_path / "f.safetensors", large[0].read_bytes()
    for other in (content[:-REGION_BYTES], content + content[-REGION_BYTES:]):
        path.write_bytes(other)
        with pytest.raises(DamagedFileError, match="checksum"):
            stored.load(path)


def test_token_ids_are_not_read_from_a_damaged_header(tmp_path: Path) -> None:
    path = stored.dump(tmp_path / "f.safetensors", stored.item())
    content = path.read_bytes()
    other = content.replace(b'token_ids\\":[0,1', b'token_ids\\":[0,2')
    assert other != content
    path.write_bytes(other)
    with pytest.raises(DamagedFileError, match="checksum"):
        read_head(path)


def test_older_files_with_one_checksum_are_read_and_verified(tmp_path: Path) -> None:
    loaded = stored.load(GOLDEN)
    assert [(item.kv_cache_id, item.metadata.tokens) for item in loaded] == [
        ("a", stored.metadata(6, 0).tokens),
        ("b", stored.metadata(3, 0).tokens),
    ]
    for item in loaded:
        for layer, (keys, values) in enumerate(layers_of(item.kv_cache)):
            counted = 1000 * layer + torch.arange(keys.numel(), dtype=torch.float32).view(keys.shape)
            assert keys.equal(counted) and values.equal(-counted)
    assert read_head(GOLDEN).token_ids == tuple(range(6))
    content = GOLDEN.read_bytes()
    path = tmp_path / "f.safetensors"
    for at in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=path.name):
            stored.load(path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pinned buffers, and copies on a stream")
def test_a_gpu_gets_the_same_bits(large: tuple[Path, list[KVCacheItem]], tmp_path: Path) -> None:
    path, items = large
    gpu = torch.device("cuda")
    for _ in range(5):
        loaded = SafetensorsFile().load(path, stored.FINGERPRINT, stored.CONFIG, gpu)
        for ours, item in zip(loaded, items, strict=True):
            for pair, theirs in zip(layers_of(ours.kv_cache), layers_of(item.kv_cache), strict=True):
                assert all(a.cpu().equal(b) for a, b in zip(pair, theirs, strict=True))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    damaged = tmp_path / "f.safetensors"
    damaged.write_bytes(content)
    with pytest.raises(DamagedFileError, match="checksum"):
        SafetensorsFile().load(damaged, stored.FINGERPRINT, stored.CONFIG, gpu)


def _staged(
    path: Path, content: bytes | bytearray, regions: Regions, spans: list[parallel_read.Span]
) -> list[torch.Tensor]:
    path.write_bytes(content)
    with open(path, "rb", buffering=0) as file:
        return parallel_read.read(file, 0, regions, spans, stored.CPU, path)


def _same_when_staged(path: Path, items: list[KVCacheItem]) -> None:
    with open(path, "rb", buffering=0) as file:
        header = read_header(file, path)
        tensors = read_tensors(file, header, [[("k", "v")] * stored.LAYERS] * len(items), stored.CPU, path)
    caches = [
        from_layers(
            [(tensors[f"{i}.{layer}.k"], tensors[f"{i}.{layer}.v"]) for layer in range(stored.LAYERS)], stored.CONFIG
        )
        for i in range(len(items))
    ]
    assert all(stored.same_tensors(cache, item.kv_cache) for cache, item in zip(caches, items, strict=True))


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises. Fails after so many seconds, and leaves the thread running."""
    outcome: list[T | BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"not done within {seconds} s"
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]
