"""Pickles made to harm: nothing in them runs, little of them makes little, and the memory in place stays."""

from __future__ import annotations

import enum
import io
import os
import pickle
import resource
import types
import zipfile
import zoneinfo
from collections.abc import Callable
from datetime import datetime, timedelta, timezone, tzinfo
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from kvmem import KVCacheItem as MemoryItem
from kvmem.cache.dynamic_cache import layers_of
from kvmem.errors import DamagedFileError, StorageError, UnsafeFileError
from kvmem.storage import safe_unpickler
from tests.faults.test_files_damaged import dump_file
from tests.helpers import stored
from tests.helpers.memos import KVCacheItem, OldItem, old_cache, stand_in
from tests.helpers.tiny import copy_of, kind, memory_on, pairs, same_bits, tiny_backend

MB = 1 << 20
LOAD, REBUILD = b"ctorch.storage\n_load_from_bytes\n", b"ctorch._utils\n_rebuild_tensor_v2\n"


class Calls:
    """A pickle that calls `function(*args)`, and then gives the result a state, when an ordinary unpickler reads it."""

    def __init__(self, function: Callable[..., object], *args: object, state: object = None) -> None:
        self.reduced = (function, args, state)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory.pickle"


@pytest.fixture
def memos(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    return stand_in(monkeypatch)


def grown_megabytes(work: Callable[[], object]) -> float:
    """By how much `work` raised the most memory that this process ever had."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def refused(path: Path, content: bytes, match: str = "") -> None:
    path.write_bytes(content)
    with pytest.raises(StorageError, match=match or path.name):
        stored.load(path)


def test_a_bomb_runs_nothing_and_the_memory_stays(tmp_path: Path) -> None:
    memory = memory_on(tiny_backend("qwen3"), memory_filename="memory.pickle")
    item = memory.extract(pairs(1, 300)[0][0])
    memory.add(item)
    path = memory.dump(tmp_path)
    before, content, proof = copy_of(item), path.read_bytes(), tmp_path / "ran"
    for bomb in (
        Calls(os.system, f"touch {proof}"),
        Calls(eval, f"open({str(proof)!r}, 'w')"),
        {"kv_cache_memories": {"a": Calls(os.system, f"touch {proof}")}},
        Calls(torch.storage._load_from_bytes, pickle.dumps(Calls(os.system, f"touch {proof}"))),
    ):
        path.write_bytes(pickle.dumps(bomb))
        with pytest.raises(StorageError, match=path.name):
            memory.load(tmp_path)
        assert memory.get_all() == [item] and same_bits(item, before)
    assert not proof.exists()
    path.write_bytes(content)
    assert memory.load(tmp_path) == 1 and same_bits(memory.get_all()[0], before)


def test_a_large_index_allocates_no_table(path: Path) -> None:
    """The unpickler in C makes a table of twice as many entries: 512 MB here, and 32 GB for the largest index."""
    index = (1 << 25).to_bytes(4, "little")
    grown = grown_megabytes(lambda: refused(path, b"\x80\x02Nr" + index + b"."))
    assert grown < 100


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x8e" + (10 << 40).to_bytes(8, "little") + b"x.",  # BINBYTES8
        b"\x80\x04\x8d" + (10 << 40).to_bytes(8, "little") + b"x.",  # BINUNICODE8
        b"\x80\x05\x96" + (10 << 40).to_bytes(8, "little") + b"x.",  # BYTEARRAY8
        b"\x80\x04\x95" + (10 << 40).to_bytes(8, "little") + b"x.",  # FRAME
        b"\x80\x02\x8b" + (1 << 30).to_bytes(4, "little") + b"x.",  # LONG4
        b"\x80\x04B" + (0xFFFFFFFF).to_bytes(4, "little") + b"x.",  # BINBYTES
    ],
)
def test_a_string_of_10_tb_is_refused(path: Path, content: bytes) -> None:
    assert grown_megabytes(lambda: refused(path, content, "not a complete pickle")) < 100


def raw_storage(values: torch.Tensor) -> bytes:
    """The bytes in which torch pickles the storage of `values`."""
    file = io.BytesIO()
    torch.save(values.untyped_storage(), file)
    return file.getvalue()


def test_compressed_bytes_of_a_tensor_are_refused(path: Path) -> None:
    """64 MB of zeros in 64 kB. torch's reader would inflate them."""
    plain = zipfile.ZipFile(io.BytesIO(raw_storage(torch.zeros(64 * MB // 4))))
    small = io.BytesIO()
    with zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in plain.infolist():
            archive.writestr(entry.filename, plain.read(entry))
    assert len(small.getvalue()) < MB
    refused(path, pickle.dumps(Calls(torch.storage._load_from_bytes, small.getvalue())), "compressed")


def test_a_call_that_is_repeated_makes_no_more_than_the_file_has(path: Path) -> None:
    """Eight bytes a call would load the same 1 MB again."""
    raw = raw_storage(torch.zeros(MB // 4))
    body = b"B" + len(raw).to_bytes(4, "little") + raw + b"q\x00" + b"0"
    calls = LOAD + b"q\x010" + b"](" + b"h\x01h\x00\x85R" * 1000 + b"e."
    grown = grown_megabytes(lambda: refused(path, b"\x80\x02" + body + calls, "more bytes than it has"))
    assert grown < 100


def typed(values: torch.Tensor) -> torch.storage.TypedStorage:
    return torch.storage.TypedStorage(wrap_storage=values.untyped_storage(), dtype=values.dtype, _internal=True)


def test_a_tensor_that_repeats_one_element_10_tb_long_is_refused(path: Path) -> None:
    storage = typed(torch.zeros(4))
    for size, stride in (((1, 2, 10**12, 8), (0, 0, 0, 0)), ((2, 2, 2), (1, 1, 1))):
        rebuild = Calls(torch._utils._rebuild_tensor_v2, storage, 0, size, stride, False, {})
        refused(path, pickle.dumps(rebuild), "more elements than its storage")


def test_a_state_for_a_tensor_changes_no_tensor(path: Path) -> None:
    """torch's own `__setstate__` would point it at memory behind its storage."""
    values = torch.arange(4.0)
    state = (typed(values), 1000, (4,), (1,))
    rebuild = Calls(torch._utils._rebuild_tensor_v2, typed(values), 0, (4,), (1,), False, {}, state=state)
    path.write_bytes(pickle.dumps(rebuild))
    with open(path, "rb") as file:
        loaded = safe_unpickler.tensor_of(safe_unpickler.load(file, path))
    assert loaded is not None and loaded.equal(values)


@pytest.mark.parametrize("name", [LOAD, REBUILD, b"ctransformers.cache_utils\nDynamicCache\n", b"cbuiltins\nset\n"])
@pytest.mark.parametrize("attribute", [b"__new__", b"__call__", b"fields", b"budget"])
def test_a_pickle_sets_no_attribute_of_what_it_may_call(
    memos: types.ModuleType, path: Path, name: bytes, attribute: bytes
) -> None:
    state = b"N}X" + len(attribute).to_bytes(4, "little") + attribute + b"Ns\x86"
    for made in (state, b"}X" + len(attribute).to_bytes(4, "little") + attribute + b"Ns"):
        refused(path, b"\x80\x02" + name + made + b"b.")
        item = KVCacheItem(id="a", memory=stored.item().kv_cache)
        path.write_bytes(pickle.dumps({"kv_cache_memories": {"a": item}}))
        assert layers_of(stored.load(path)[0].kv_cache)[0][0].equal(layers_of(stored.item().kv_cache)[0][0])


def test_metadata_of_billions_of_values_is_left_out(memos: types.ModuleType, path: Path) -> None:
    """Lists that hold one list ten times, thirty levels deep, in a few hundred bytes; and one 100,000 levels deep."""
    wide: list[Any] = ["x"]
    for _ in range(30):
        wide = [wide] * 10
    item = KVCacheItem(id="a", memory=stored.item().kv_cache, metadata={"wide": wide, "deep": "here", "tags": ["kept"]})
    content = pickle.dumps({"kv_cache_memories": [item]}, protocol=3)
    text = b"X\x04\x00\x00\x00here"
    assert content.count(text) == 1
    path.write_bytes(content.replace(text, b"]" * 100_000 + b"a" * 99_999))
    (loaded,) = stored.load(path)
    assert loaded.metadata.textual_memory is not None
    assert loaded.metadata.textual_memory.metadata == {"tags": ["kept"]}


@pytest.mark.parametrize("id_", [None, 7, 10**5000, ["a"], b"a"], ids=kind)
def test_an_id_that_is_no_text_is_refused(memos: types.ModuleType, path: Path, id_: object) -> None:
    item = KVCacheItem.model_construct(id=id_, memory=stored.item().kv_cache)
    refused(path, pickle.dumps({"kv_cache_memories": [item]}), "no id that is text")


def test_fewer_values_than_keys_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an older cache, whose keys and values are two lists."""
    stand_in(monkeypatch, OldItem)
    cache = old_cache(layers_of(stored.item().kv_cache))
    del cache.__dict__["value_cache"][1]
    refused(path, pickle.dumps([OldItem(kv_cache_id="old", kv_cache=cache)]), "holds no keys and values")


def test_unsafe_names_are_told_from_damage(path: Path) -> None:
    path.write_bytes(b"\x80\x02cos\nsystem\n.")
    with pytest.raises(UnsafeFileError, match=r"it names os\.system"):
        stored.load(path)
    path.write_bytes(b"\x80\x02X")
    with pytest.raises(DamagedFileError, match="not a complete pickle"):
        stored.load(path)


@pytest.mark.parametrize("first", ["memory.pickle", "memory.safetensors"])
def test_what_was_loaded_can_be_dumped_as_a_pickle_and_loaded_again(tmp_path: Path, first: str) -> None:
    """The time of a loaded item has a time zone of another class, which a pickle would name."""
    item = stored.item()
    (once,) = stored.load(dump_file(tmp_path / first, item))
    (twice,) = stored.load(dump_file(tmp_path / "again.pickle", once))
    assert twice.metadata == item.metadata and stored.same_tensors(twice.kv_cache, item.kv_cache)


@pytest.mark.parametrize("zone", [zoneinfo.ZoneInfo("Asia/Tokyo"), timezone(timedelta(hours=-3)), None], ids=str)
def test_a_time_of_any_zone_can_be_dumped(path: Path, zone: tzinfo | None) -> None:
    item = stored.item()
    item.metadata = item.metadata.model_copy(update={"extracted_at": datetime(2026, 5, 1, 12, tzinfo=zone)})
    (loaded,) = stored.load(dump_file(path, item))
    assert loaded.metadata.extracted_at == item.metadata.extracted_at


class Id(enum.StrEnum):
    A = "a"


@pytest.mark.parametrize("id_", [np.str_("a"), Id.A], ids=kind)
def test_an_id_of_another_class_of_texts_can_be_dumped(path: Path, id_: str) -> None:
    item = stored.item()
    (loaded,) = stored.load(dump_file(path, MemoryItem(item.kv_cache, item.metadata, id_)))
    assert loaded.kv_cache_id == "a"


def test_a_pickle_whose_times_name_the_zone_of_pydantic_is_read(memos: types.ModuleType, path: Path) -> None:
    """As kvmem wrote them after a load."""
    loaded_time = TypeAdapter(datetime).validate_json('"2026-05-01T12:00:00Z"')
    item = KVCacheItem(id="a", memory=stored.item().kv_cache, metadata={"source_text": "A text", "at": loaded_time})
    path.write_bytes(pickle.dumps({"kv_cache_memories": {"a": item}}))
    assert [each.kv_cache_id for each in stored.load(path)] == ["a"]
