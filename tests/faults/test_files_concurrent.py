"""Several writers in one folder: every file is complete, and no writer fails for another's sake."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvmem import storage
from kvmem.errors import KVMemError, StorageError
from kvmem.storage import remove_abandoned, replacing
from kvmem.tiers import TieredCache
from tests.helpers import stored
from tests.helpers.tiny import memory_on, pairs, tiny_backend

SUFFIXES = sorted(cls.suffixes[0] for cls in storage.FORMATS.classes().values())
CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(params=SUFFIXES)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"memory{request.param}"


def test_threads_dump_and_load_in_one_folder(path: Path) -> None:
    items = [stored.item(str(n), tokens=50 + n, seed=n) for n in range(3)]
    stored.dump(path, items[0])
    start = threading.Barrier(4)

    def dump(n: int) -> None:
        start.wait()
        for _ in range(12):
            stored.dump(path, items[n])

    def load() -> None:
        start.wait()
        for _ in range(12):
            (loaded,) = stored.load(path)
            assert stored.same(loaded, items[int(loaded.kv_cache_id)])

    with ThreadPoolExecutor(4) as pool:
        for future in [*(pool.submit(dump, n) for n in range(3)), pool.submit(load)]:
            future.result()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


DUMP_OFTEN = """
import sys
from pathlib import Path
from tests.helpers import stored
n = int(sys.argv[2])
item = stored.item(str(n), tokens=50 + n, seed=n)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(12):
    stored.dump(Path(sys.argv[1]), item)
"""


def test_processes_dump_into_one_folder(path: Path) -> None:
    command = [sys.executable, "-c", DUMP_OFTEN, str(path)]
    writers = [
        subprocess.Popen(
            [*command, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=CHECKOUT
        )
        for n in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
    for writer in writers:
        _, errors = writer.communicate(b"go\n", timeout=60)
        assert writer.returncode == 0, errors.decode()
    (loaded,) = stored.load(path)
    n = int(loaded.kv_cache_id)
    assert stored.same_tensors(loaded.kv_cache, stored.item(tokens=50 + n, seed=n).kv_cache)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_another_writer_left_and_can_not_be_removed_is_no_error(path: Path) -> None:
    """Here folders have the names of a partial file and of a lock, which can be neither locked nor deleted."""
    first, second = (path.with_name(f".{path.name}.{name}.partial") for name in ("first", "second"))
    first.mkdir()
    (first / "inside").write_text("a file")
    second.write_text("half a memory")
    second.with_name(second.name + ".lock").mkdir()
    item = stored.item()
    assert stored.same(stored.load(stored.dump(path, item))[0], item)


def test_a_tier_leaves_the_partial_file_of_a_running_dump(tmp_path: Path) -> None:
    backend = tiny_backend("qwen3")
    abandoned = tmp_path / ".old.safetensors.1.partial"
    abandoned.write_bytes(b"half")
    with replacing(tmp_path / "memory.safetensors") as file:
        file.write(b"half ")
        TieredCache(backend, {"disk": 1 << 30}, tmp_path).close()
        file.write(b"whole")
    assert (tmp_path / "memory.safetensors").read_bytes() == b"half whole"
    assert not abandoned.exists()


@pytest.mark.parametrize("name", ["a[1]*?.safetensors", "n" * 240 + ".safetensors", "ü" * 110 + ".safetensors"])
def test_a_legal_name_can_be_written_and_its_leftovers_are_removed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    item = stored.item()
    stored.dump(path, item)
    with replacing(path):
        (partial,) = tmp_path.glob(".*.partial")
    partial.write_bytes(b"left by a killed writer")
    stored.dump(path, item)
    assert stored.same(stored.load(path)[0], item)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    remove_abandoned(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [name]


TAKE_A_TIER = """
import sys
from kvmem.errors import StorageError
from kvmem.tiers import TieredCache
from tests.helpers.tiny import tiny_backend
try:
    TieredCache(tiny_backend("qwen3"), {"disk": 1 << 30}, sys.argv[1])
except StorageError as error:
    print(error)
"""


def test_two_processes_on_the_folder_of_a_tier(tmp_path: Path) -> None:
    """The second one is told; the first one goes on, and its items are intact."""
    backend = tiny_backend("qwen3")
    item = memory_on(backend).extract(pairs(1, 300)[0][0])
    tiers = TieredCache(backend, {"disk": 1 << 30}, tmp_path)
    tiers.put(item, "disk")
    command = [sys.executable, "-c", TAKE_A_TIER, str(tmp_path)]
    told = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    assert f"{tmp_path} is another process's tier" in told
    with tiers.use(item.kv_cache_id) as used:
        assert stored.same(used, item)
    tiers.close()
    again = TieredCache(backend, {"disk": 1 << 30}, tmp_path)
    assert again.ids() == [item.kv_cache_id]
    again.close()


def test_two_memories_on_one_folder_load_what_the_last_one_wrote(tmp_path: Path) -> None:
    backend = tiny_backend("qwen3")
    ours, theirs = memory_on(backend), memory_on(backend)
    ours.add(ours.extract("The first memory of all."))
    ours.dump(tmp_path)
    theirs.add([theirs.extract("The second memory."), theirs.extract("A third one.")])
    theirs.dump(tmp_path)
    assert len(ours.get_all()) == 1 and ours.load(tmp_path) == 2


def test_a_folder_that_can_not_hold_a_tier_is_named(tmp_path: Path) -> None:
    backend = tiny_backend("qwen3")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="file can't hold a tier"):
        TieredCache(backend, {"disk": 1 << 30}, tmp_path / "file")


def test_links_in_a_circle_are_named(path: Path) -> None:
    path.symlink_to(path.with_name("other"))
    path.with_name("other").symlink_to(path)
    for use in (lambda: stored.dump(path, stored.item()), lambda: stored.load(path)):
        with pytest.raises(KVMemError, match=path.name):
            use()
