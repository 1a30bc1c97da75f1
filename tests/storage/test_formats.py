"""What every file format guarantees: exact bits, bad files refused, and good files that survive a failed write."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmem import storage
from kvmem.cache.dynamic_cache import crop, from_layers, layers_of, nbytes
from kvmem.cache.items import KVCacheItem
from kvmem.errors import DamagedFileError, FingerprintError, StorageError
from kvmem.storage import manifest
from kvmem.storage.atomic_write import replacing
from tests.helpers import stored

FORMATS = {cls().suffixes[0]: cls for cls in storage.FORMATS.classes().values()}
MANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FAR_PAST_THE_FILE = 1 << 40


@pytest.fixture(params=sorted(FORMATS))
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"memory{request.param}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_round_trip_keeps_every_bit(path: Path, dtype: torch.dtype) -> None:
    model = stored.FINGERPRINT.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    items = [stored.item(name, tokens, tokens, dtype, model) for name, tokens in (("a", 6), ("b", 1), ("ü", 9))]
    loaded = stored.load(stored.dump(path, *items), model)
    assert [item.kv_cache_id for item in loaded] == ["a", "b", "ü"]
    assert all(map(stored.same, loaded, items))


def test_the_smallest_and_largest_numbers_keep_their_bits(path: Path) -> None:
    item = stored.item()
    layers_of(item.kv_cache)[0][0].view(-1)[:4] = torch.tensor([-0.0, 1e-45, -3.4e38, 3.4e38])
    assert stored.same(stored.load(stored.dump(path, item))[0], item)


def test_an_empty_memory_is_stored(path: Path) -> None:
    assert stored.load(stored.dump(path)) == []


def test_sliding_layers_keep_the_length_of_their_text(path: Path) -> None:
    whole = layers_of(stored.item(tokens=9).kv_cache)
    layers = [(keys[..., -stored.WINDOW :, :], values[..., -stored.WINDOW :, :]) for keys, values in whole]
    item = KVCacheItem(from_layers(layers, stored.SLIDING_CONFIG, 9), stored.metadata(9, 0), "slid")
    (loaded,) = stored.load(stored.dump(path, item), config=stored.SLIDING_CONFIG)
    assert loaded.kv_cache.get_seq_length() == 9
    assert stored.same(loaded, item)


def test_cropped_tokens_are_not_in_the_file(path: Path) -> None:
    item = stored.item(tokens=2000)
    crop(item.kv_cache, 3)
    item.metadata = stored.metadata(3, nbytes(item.kv_cache))
    assert not layers_of(item.kv_cache)[0][0].is_contiguous()
    (loaded,) = stored.load(stored.dump(path, item))
    assert stored.same_tensors(loaded.kv_cache, item.kv_cache)
    assert path.stat().st_size < 50_000


def test_a_dump_leaves_loaded_items_unchanged(path: Path) -> None:
    old = stored.item("old", seed=1)
    (loaded,) = stored.load(stored.dump(path, old))
    stored.dump(path, stored.item("new", tokens=3, seed=2))
    assert stored.same(loaded, old)
    assert stored.load(path)[0].kv_cache_id == "new"


def test_writing_into_a_loaded_tensor_changes_no_file(path: Path) -> None:
    item = stored.item()
    (loaded,) = stored.load(stored.dump(path, item))
    layers_of(loaded.kv_cache)[0][0].zero_()
    assert stored.same(stored.load(path)[0], item)


def test_another_model_is_refused_with_the_first_field_that_differs(path: Path) -> None:
    other = stored.FINGERPRINT.model_copy(update={"weights": "w1"})
    stored.dump(path, stored.item("a"), stored.item("b", fingerprint=other))
    with pytest.raises(FingerprintError, match="item b was built by another model: weights: w0 here, w1 there"):
        stored.load(path)


def test_an_unverified_item_is_checked_by_shape(path: Path) -> None:
    stored.dump(path, stored.item(fingerprint=None))
    assert stored.load(path)[0].metadata.fingerprint is None
    with pytest.raises(FingerprintError, match="kv_heads: 4 here, 2 there"):
        stored.load(path, stored.FINGERPRINT.model_copy(update={"kv_heads": 4}))
    with pytest.raises(FingerprintError, match="dtype: bfloat16 here, float32 there"):
        stored.load(path, stored.FINGERPRINT.model_copy(update={"dtype": "bfloat16"}))


def test_a_future_version_is_not_reported_as_damage(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "KEYS_AND_VALUES_ONLY", 7)
    stored.dump(path, stored.item())
    monkeypatch.undo()
    with pytest.raises(StorageError, match=r"version 7, .* reads up to version 3\. Upgrade kvmem") as raised:
        stored.load(path)
    assert not isinstance(raised.value, DamagedFileError)


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(StorageError, match=path.name):
        stored.load(path)


@pytest.mark.parametrize("content", [b"", b"\x00", b"not a memory", bytes(range(256)) * 20, b"\x80\x04N.", b"{}" * 500])
def test_garbage_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(StorageError, match=path.name):
        stored.load(path)


@MANY
@given(at=st.integers(0, FAR_PAST_THE_FILE))
def test_a_truncated_file_is_refused(path: Path, at: int) -> None:
    whole = _whole(path)
    path.write_bytes(whole[: at % len(whole)])
    with pytest.raises(StorageError):
        stored.load(path)


@MANY
@given(at=st.integers(0, FAR_PAST_THE_FILE), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_refused(path: Path, at: int, bit: int) -> None:
    damaged = bytearray(_whole(path))
    damaged[at % len(damaged)] ^= 1 << bit
    path.write_bytes(damaged)
    with pytest.raises(StorageError):
        stored.load(path)


def test_extra_bytes_at_the_end_are_refused(path: Path) -> None:
    path.write_bytes(_whole(path) + b"\x00" * 64)
    with pytest.raises(DamagedFileError):
        stored.load(path)


def test_a_path_that_can_not_be_written_is_named_and_nothing_is_lost(path: Path) -> None:
    item = stored.item()
    stored.dump(path, item)
    path.with_name("folder" + path.suffix).mkdir()
    with pytest.raises(StorageError, match="folder"):
        stored.dump(path.with_name("folder" + path.suffix), item)
    with pytest.raises(StorageError, match="nowhere"):
        stored.dump(path.parent / "nowhere" / path.name, item)
    assert stored.same(stored.load(path)[0], item)
    assert not list(path.parent.glob(".*.partial"))


def test_a_failed_dump_leaves_the_old_file(path: Path) -> None:
    old, bad = stored.item("old"), stored.item("bad")
    stored.dump(path, old)
    bad.metadata.textual_memory.metadata["socket"] = object()  # type: ignore[union-attr]
    with pytest.raises(StorageError, match="JSON"):
        stored.dump(path, stored.item("fine"), bad)
    assert stored.same(stored.load(path)[0], old)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_link_stays_a_link(path: Path) -> None:
    there = path.parent / "elsewhere"
    there.mkdir()
    path.symlink_to(there / path.name)
    stored.dump(path, stored.item())
    assert path.is_symlink()
    assert stored.same(stored.load(there / path.name)[0], stored.load(path)[0])


def test_no_file_handle_is_left_open(path: Path) -> None:
    stored.dump(path, stored.item())
    stored.load(path)
    gc.collect()
    before = len(os.listdir("/dev/fd"))
    for _ in range(20):
        stored.dump(path, stored.item())
        stored.load(path)
    gc.collect()
    assert len(os.listdir("/dev/fd")) == before


DUMP_FOREVER = """
import sys
from pathlib import Path
from tests.helpers import stored
new = stored.item("new", tokens=200_000, seed=9)
print("ready", flush=True)
while True:
    stored.dump(Path(sys.argv[1]), new)
"""


def test_a_kill_during_a_dump_leaves_a_complete_file(path: Path) -> None:
    old = stored.item("old")
    stored.dump(path, old)
    for _ in range(10):
        command = [sys.executable, "-c", DUMP_FOREVER, str(path)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 60
        while not (partials := [file for file in path.parent.glob(".*.partial") if _size(file) > 1_000_000]):
            assert time.monotonic() < deadline, "the dump never got under way"
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        if any(partial.exists() for partial in partials):
            break
    else:
        pytest.fail("no kill came in the middle of a dump")
    (kept,) = stored.load(path)
    assert stored.same(kept, old) or kept.kv_cache_id == "new"
    stored.dump(path, old)
    assert [file.name for file in path.parent.iterdir()] == [path.name], (
        "the next dump removes what the killed one left"
    )


def test_the_partial_file_of_a_running_dump_is_kept(path: Path) -> None:
    with replacing(path) as slow:
        slow.write(b"half")
        stored.dump(path, stored.item("quick"))
        assert len(list(path.parent.glob(".*.partial"))) == 1
        slow.write(b" whole")
    assert path.read_bytes() == b"half whole"


def _whole(path: Path) -> bytes:
    keep = path.with_name("whole" + path.suffix)
    if not keep.exists():
        stored.dump(keep, stored.item("a"), stored.item("b", 3, 1))
    return keep.read_bytes()


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0
