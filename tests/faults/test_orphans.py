"""Files of clients that are gone are deleted after the stated time, and nothing else ever is."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from kvmem.cache.items import KVCacheItem
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.engines.vllm.connector import NO_LEASE, lease_name, lease_of, memory_name, part_name, report_name
from kvmem.engines.vllm.connector.orphans import Orphans
from kvmem.engines.vllm.memory_files import FileStore

AFTER_S = 100.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 1e6

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server(tmp_path: Path, clock: Clock) -> Orphans:
    return Orphans(tmp_path, AFTER_S, clock)


def written(folder: Path, *names: str) -> set[str]:
    for name in names:
        (folder / name).write_bytes(b"a memory")
    return set(names)


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def passes(clock: Clock, server: Orphans, seconds: float) -> set[str]:
    """What the server deletes while so much time passes, in steps."""
    deleted: set[str] = set()
    for _ in range(10):
        clock.now_s += seconds / 10
        deleted |= set(server.collect())
    return deleted


def touched(folder: Path, client: str) -> None:
    path = folder / lease_name(lease_of(client))
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.touch()
    while path.stat().st_mtime_ns == before:  # the file system's clock is coarse
        path.touch()


def test_all_files_of_a_client_without_a_sign_of_life_are_deleted(
    tmp_path: Path, clock: Clock, server: Orphans
) -> None:
    name = memory_name("acme", lease_of("dead"))
    gone = written(
        tmp_path,
        name,
        memory_name("", lease_of("dead")),
        *(part_name(name, rank, 2) for rank in range(2)),
        f".{name}.{'0' * 32}.partial",
        f".{name}.{'0' * 32}.partial.lock",
        report_name("one that nobody read"),
    )
    touched(tmp_path, "dead")
    server.collect()
    assert not passes(clock, server, AFTER_S * 0.9)
    assert passes(clock, server, AFTER_S * 0.2) == {*gone, lease_name(lease_of("dead"))}
    assert left(tmp_path) == set()


def test_what_is_not_an_orphan_stays(tmp_path: Path, clock: Clock, server: Orphans) -> None:
    alive = memory_name("", lease_of("alive"))
    kept = written(
        tmp_path,
        alive,
        memory_name("", NO_LEASE),  # of an engine in its own process
        "kvmem_server.json",
        "kvmem_save_key",
        "activation_memory.safetensors",
        "8c0f6c35-5d3b-4f1e-9f5e-0a4c8d2b7f11.safetensors",
        "notes.report",
        f"x{alive}",
    )
    (tmp_path / memory_name("", lease_of("a folder"))).mkdir()
    server.collect()
    for _ in range(30):
        touched(tmp_path, "alive")
        clock.now_s += AFTER_S / 3
        server.collect()
    assert kept <= left(tmp_path)
    assert len(left(tmp_path) - kept) == 2  # the folder and the lease


def test_a_clock_that_jumps_and_another_machines_clock_delete_nothing(
    tmp_path: Path, clock: Clock, server: Orphans
) -> None:
    name = memory_name("", lease_of("alive"))
    written(tmp_path, name)
    lease = tmp_path / lease_name(lease_of("alive"))
    for years in (-30, 30, 0):
        touched(tmp_path, "alive")
        seconds = lease.stat().st_mtime + years * 3.15e7
        os.utime(lease, (seconds, seconds))
        assert not passes(clock, server, AFTER_S * 0.9)
    assert (tmp_path / name).is_file()


def test_a_server_that_was_just_started_waits_its_time(tmp_path: Path, clock: Clock) -> None:
    written(tmp_path, memory_name("", lease_of("unknown")))
    for _ in range(3):
        restarted = Orphans(tmp_path, AFTER_S, clock)
        restarted.collect()
        assert not passes(clock, restarted, AFTER_S * 0.9)


def test_what_another_server_loads_stays(tmp_path: Path, clock: Clock, server: Orphans) -> None:
    used, unused = memory_name("", lease_of("killed")), memory_name("", lease_of("killed too"))
    written(tmp_path, used, unused)
    other = Orphans(tmp_path, AFTER_S, clock)
    server.collect()
    for _ in range(12):
        other.renew(used)
        clock.now_s += AFTER_S / 4
        server.collect()
    assert left(tmp_path) == {used, lease_name(lease_of("killed"))}
    assert passes(clock, server, 2 * AFTER_S) == {used, lease_name(lease_of("killed"))}


def test_a_client_renews_its_lease_and_takes_everything_with_it(qwen3: HFBackend, tmp_path: Path) -> None:
    store = FileStore(shared=tmp_path, orphans_after_s=0.8, default_namespace="acme")
    item = qwen3.build("A rule of some words.")
    file = store.file_of(item)
    lease = tmp_path / lease_name(store.lease.name)
    assert left(tmp_path) == {file.name, lease.name}
    assert file.name.startswith(memory_name("acme", store.lease.name)[:66])
    before = lease.stat().st_mtime_ns
    while lease.stat().st_mtime_ns == before:  # a thread renews it
        pass
    lease.unlink()  # by mistake
    while not lease.exists():
        pass
    del store
    gc.collect()
    assert file.path.is_file() and lease.exists()  # a handle may outlive the store
    del file, item
    gc.collect()
    assert left(tmp_path) == set()


def test_a_file_belongs_to_its_items_namespace(qwen3: HFBackend, tmp_path: Path) -> None:
    store = FileStore(tmp_path, default_namespace="default")
    item = qwen3.build("A rule of some words.", namespace="acme")
    plain = KVCacheItem(item.kv_cache, item.metadata.model_copy(update={"namespace": ""}))
    assert store.file_of(item).name[:32] == memory_name("acme", NO_LEASE)[:32]
    assert store.file_of(plain).name[:32] == memory_name("default", NO_LEASE)[:32]
    assert store.view(item).namespace == "acme"
