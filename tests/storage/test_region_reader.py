"""Regions that are read on threads and in a child process: same bytes, same errors, and no child left behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import xxhash

from kvmem.errors import DamagedFileError, StorageError
from kvmem.storage import ProcessReader, SharedMemory, ThreadReader
from kvmem.storage.region_reads import Part, RegionRead

NBYTES = 1 << 20
REGION = 50_000
needs_memfd = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux shares memory without a file")
SLOW = NBYTES / 2
"""Bytes a second: the whole file takes two seconds."""


@pytest.fixture
def memory() -> SharedMemory:
    return SharedMemory(4 * NBYTES)


def reader_of(kind: str, memory: SharedMemory, bytes_per_s: float | None = None) -> ThreadReader:
    return ThreadReader(bytes_per_s) if kind == "threads" else ProcessReader(memory, bytes_per_s)


@pytest.fixture(params=["threads", pytest.param("process", marks=needs_memfd)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def reader(kind: str, memory: SharedMemory) -> Iterator[ThreadReader]:
    reader = reader_of(kind, memory)
    yield reader
    reader.stop()


def file_of(folder: Path, seed: int = 0) -> tuple[Path, bytes]:
    path, data = folder / f"{seed}.bin", random.Random(seed).randbytes(NBYTES)
    path.write_bytes(data)
    return path, data


def regions_of(data: bytes, memory_at: int = 0, parts: int = 1, first: int = 0) -> list[RegionRead]:
    """Each region in so many parts, from its byte `first` on, side by side in the memory with 7 bytes between."""
    reads = []
    for at in range(0, len(data), REGION):
        whole = data[at : at + REGION]
        edges = [first + (len(whole) - first) * part // parts for part in range(parts + 1)]
        wanted = []
        for low, high in pairwise(edges):
            wanted.append(Part(low, memory_at, high - low))
            memory_at += high - low + 7
        reads.append(RegionRead(at, len(whole), xxhash.xxh3_128_digest(whole), tuple(wanted)))
    return reads


def read(reader: ThreadReader, path: Path, regions: list[RegionRead], memory: SharedMemory) -> None:
    with path.open("rb", buffering=0) as file:
        reader.read(path, file, regions, memory.map)


@pytest.mark.parametrize(("parts", "first"), [(1, 0), (3, 0), (1, 1000), (4, 49_000)])
def test_wanted_bytes_and_no_others_are_filled(
    reader: ThreadReader, memory: SharedMemory, tmp_path: Path, parts: int, first: int
) -> None:
    path, data = file_of(tmp_path)
    regions = regions_of(data, 100, parts, first)
    expected = bytearray(4 * NBYTES)
    for region in regions:
        for part in region.parts:
            start = region.at + part.at
            expected[part.memory_at : part.memory_at + part.nbytes] = data[start : start + part.nbytes]
    read(reader, path, regions, memory)
    assert memory.map[:] == expected


def test_reads_at_the_same_time_have_their_own_outcomes(
    reader: ThreadReader, memory: SharedMemory, tmp_path: Path
) -> None:
    files = [file_of(tmp_path, seed) for seed in range(3)]
    with files[1][0].open("r+b") as damaged:
        damaged.seek(NBYTES // 2)
        damaged.write(bytes(8))
    errors: dict[int, str] = {}

    def run(number: int) -> None:
        path, data = files[number]
        try:
            read(reader, path, regions_of(data, number * (NBYTES + 200)), memory)
        except DamagedFileError as error:
            errors[number] = str(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(errors) == [1] and str(files[1][0]) in errors[1]
    assert memory.map[:REGION] == files[0][1][:REGION]
    at = 2 * (NBYTES + 200)
    assert memory.map[at : at + REGION] == files[2][1][:REGION]


def test_a_file_that_ends_early_is_damaged(reader: ThreadReader, memory: SharedMemory, tmp_path: Path) -> None:
    path, data = file_of(tmp_path)
    os.truncate(path, NBYTES - 1)
    with pytest.raises(DamagedFileError, match=r"0\.bin"):
        read(reader, path, regions_of(data), memory)


def test_the_end_of_the_engine_ends_a_slow_read(kind: str, memory: SharedMemory, tmp_path: Path) -> None:
    path, data = file_of(tmp_path)
    reader = reader_of(kind, memory, SLOW)
    ending = threading.Timer(0.3, reader.stop)
    ending.start()
    started = time.monotonic()
    with pytest.raises(StorageError, match="The engine ends"):
        read(reader, path, regions_of(data), memory)
    assert time.monotonic() - started < 2.0, "the read would have taken two seconds"
    ending.join()
    with pytest.raises(StorageError, match="The engine ends"):
        read(reader, path, regions_of(data), memory)
    if isinstance(reader, ProcessReader):
        assert reader.child is not None and reader.child.poll() is not None


@needs_memfd
def test_a_child_that_is_killed_fails_its_reads_and_the_next_read_has_another(
    memory: SharedMemory, tmp_path: Path
) -> None:
    path, data = file_of(tmp_path)
    reader = ProcessReader(memory, SLOW)
    first = reader.child
    assert first is not None
    killing = threading.Timer(0.5, first.kill)
    killing.start()
    with pytest.raises(StorageError, match=r"reads memory files ended\. Ask again"):
        read(reader, path, regions_of(data), memory)
    read(reader, path, regions_of(data)[:2], memory)
    assert memory.map[:REGION] == data[:REGION]
    assert reader.child is not first
    reader.stop()


@needs_memfd
def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import time; from kvmem.storage import ProcessReader, SharedMemory\n"
        "reader = ProcessReader(SharedMemory(4096)); print(reader.child.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    ends = time.monotonic() + 20
    while is_running(child):
        assert time.monotonic() < ends, "the child goes on without its parent"
        time.sleep(0.05)


def is_running(process: int) -> bool:
    """Whether it does more than wait for someone to read its exit status."""
    try:
        state = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"
