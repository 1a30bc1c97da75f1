"""A worker's host memory without an engine: each rank's heads, changes under a read, and the scheduler's account."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvmem.cache.dynamic_cache import layers_of
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.engines.vllm.connector.file_reads import Read, ReadDone
from kvmem.engines.vllm.connector.host_files import HostFiles
from kvmem.engines.vllm.connector.host_memory import PAGE_BYTES
from kvmem.engines.vllm.connector.protocol import NO_LEASE, file_state, memory_name
from kvmem.storage import SafetensorsFile, read_head
from tests.helpers.tiny import pairs
from tests.vllm.reading import held_by, layers_held, read_by

(TEXT, _), (OTHER, _) = pairs(2, 900, seed=5)


def stored(engine: HFBackend, folder: Path, text: str = TEXT) -> tuple[Path, list[torch.Tensor]]:
    """A file of one memory, and its layers as (2, tokens, heads, head_dim)."""
    item = engine.build(text)
    path = folder / memory_name("", NO_LEASE)
    SafetensorsFile().dump(path, [item])
    return path, [torch.cat(kv).transpose(1, 2) for kv in layers_of(item.kv_cache)]


def test_each_rank_holds_its_own_heads_bit_by_bit(qwen3: HFBackend, tmp_path: Path) -> None:
    path, layers = stored(qwen3, tmp_path)
    heads = qwen3.fingerprint.kv_heads
    for ranks in (1, 2, 2 * heads):
        for rank in range(ranks):
            files = held_by(qwen3, tmp_path, rank, ranks)
            assert read_by(files, path) == ""
            count, first = max(heads // ranks, 1), rank * heads // ranks
            held = layers_held(files, path, len(layers), qwen3.dtype)
            for mine, whole in zip(held, layers, strict=True):
                assert mine.equal(whole[:, :, first : first + count])


def test_files_in_pages_that_are_not_adjacent(qwen3: HFBackend, tmp_path: Path) -> None:
    """And in memory of its own, where it is larger than all pages."""
    paths = [stored(qwen3, tmp_path, text * 12) for text in (TEXT, OTHER)]
    sizes = [-(-read_head(path).kv_bytes // PAGE_BYTES) for path, _ in paths]
    assert min(sizes) > 1
    for pages in (2 * sum(sizes), 1):
        files = held_by(qwen3, tmp_path, pages=pages)
        for page in range(0, len(files.memory.free), 2):  # every second page is taken
            files.memory.free.remove(page)
        for path, layers in paths:
            assert read_by(files, path) == ""
            assert all(map(torch.equal, layers_held(files, path, len(layers), qwen3.dtype), layers))
        free = len(files.memory.free)
        files.drop(file_state(paths[0][0]))
        assert len(files.memory.free) - free == (sizes[0] if pages > 1 else 0)


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def overwrite_and_set_the_time_back(path: Path) -> None:
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(before.st_size - 2000)
        file.write(bytes(1000))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("damage", [cut_off, overwrite_and_set_the_time_back, Path.unlink])
def test_what_changes_between_order_and_read_is_an_error(
    qwen3: HFBackend, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path, _ = stored(qwen3, tmp_path)
    head, key, files = read_head(path), file_state(path), held_by(qwen3, tmp_path)
    damage(path)
    files.start(Read(key, head.checksum, head.kv_bytes))
    files.reads.wait(60.0)
    (done,) = files.reads.take_done()
    assert path.name in done.error


def test_another_memory_under_the_same_name_is_not_taken_for_the_ordered_one(qwen3: HFBackend, tmp_path: Path) -> None:
    path, _ = stored(qwen3, tmp_path)
    other, _ = stored(qwen3, tmp_path, OTHER)
    head, key, files = read_head(path), file_state(path), held_by(qwen3, tmp_path)
    other.replace(path)
    files.start(Read(key, head.checksum, head.kv_bytes))
    files.reads.wait(60.0)
    (done,) = files.reads.take_done()
    assert "was replaced" in done.error


def of(name: str, pages: int, state: int = 0) -> Read:
    return Read((name, state, 0, 0, 0), name, pages * PAGE_BYTES)


def done(read: Read, error: str = "") -> ReadDone:
    return ReadDone(read.key, 0.5, error)


def account(pages: int, ranks: int = 1) -> HostFiles:
    return HostFiles(pages * PAGE_BYTES * ranks, ranks, lambda name: True)


def test_a_file_is_read_once_for_all_and_leaves_only_when_nobody_wants_it() -> None:
    files, a, b, c = account(4), of("a", 2), of("b", 2), of("c", 2)
    assert not any(files.is_ready(a, request) for request in ("1", "2", "1"))
    assert files.plan() == ([a], [])
    assert not files.is_ready(a, "3") and files.plan() == ([], [])
    files.record([done(a)])
    assert files.is_ready(a, "1") and files.is_ready(a, "4")
    assert not files.is_ready(b, "5") and files.plan() == ([b], [])
    files.record([done(b)])
    assert not files.is_ready(c, "6") and files.plan() == ([], [])  # a and b are both wanted
    files.release("5")
    assert files.plan() == ([c], [b.key])
    state = files.state()
    assert (state.hits, state.waits, state.reads, state.evictions) == (1, 5, 2, 1)
    assert (state.budget_bytes, state.used_bytes) == (4 * PAGE_BYTES, 4 * PAGE_BYTES)


def test_one_ranks_failure_is_every_ranks_and_the_next_request_tries_again() -> None:
    files, a = account(4, ranks=2), of("a", 2)
    files.is_ready(a, "1")
    files.plan()
    files.record([done(a, "damaged")])
    assert not files.failure(a, "1"), "the other rank is still reading"
    files.record([done(a)])
    assert files.failure(a, "1") == "damaged" and not files.failure(of("a", 2, state=1), "1")
    assert files.plan() == ([], [a.key])
    assert not files.is_ready(a, "2") and files.plan() == ([a], [])


def test_a_file_that_is_larger_than_the_budget_waits_for_all_to_leave() -> None:
    files, a, large = account(2), of("a", 1), of("large", 5)
    files.is_ready(a, "1")
    files.plan()
    files.record([done(a)])
    files.is_ready(large, "2")
    assert files.plan() == ([], [])
    files.release("1")
    assert files.plan() == ([large], [a.key])


def test_requests_come_before_prefetches_and_an_aborted_one_reads_nothing() -> None:
    files = account(100)
    ahead = [of(str(i), 10) for i in range(12)]
    assert files.prefetch(ahead) == 10, "as many as the budget holds"
    wanted = of("wanted", 10)
    files.is_ready(wanted, "1")
    files.is_ready(of("aborted", 10), "2")
    files.release("2")
    reads, _ = files.plan()
    assert reads == [wanted, *ahead[:3]]
    assert ("aborted", 0, 0, 0, 0) not in files.entries
