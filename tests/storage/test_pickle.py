"""MemOS's pickles: both generations are read, MemOS can read those of kvmem, and no pickle runs code."""

from __future__ import annotations

import collections
import datetime
import io
import pickle
import subprocess
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.cache_utils
from transformers import DynamicCache

from kvmem.cache.dynamic_cache import from_layers, layers_of
from kvmem.errors import DamagedFileError, FingerprintError, StorageError, UnsafeFileError
from kvmem.storage import safe_unpickler
from tests.helpers import stored
from tests.helpers.memos import KVCacheItem, KVCacheRecords, OldItem, old_cache, stand_in

TEXT = "The dial says seven."


@pytest.fixture
def memos(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module in place of MemOS's, with its items."""
    return stand_in(monkeypatch)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory.pickle"


def cache(seed: int = 0) -> DynamicCache:
    return stored.item(seed=seed).kv_cache


@pytest.mark.parametrize("protocol", [pickle.DEFAULT_PROTOCOL, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize("shape", ["dictionary", "list", "bare list"])
def test_memos_current_files_load_as_unverified(memos: types.ModuleType, path: Path, shape: str, protocol: int) -> None:
    metadata = {"source_text": TEXT, "extracted_at": "2025-07-01T12:00:00", "tags": ["dial"]}
    items = [KVCacheItem(id=str(seed), memory=cache(seed), metadata=metadata) for seed in range(2)]
    contents: dict[str, Any] = {
        "dictionary": {"kv_cache_memories": {item.id: item for item in items}},
        "list": {"kv_cache_memories": items},
        "bare list": items,
    }
    path.write_bytes(pickle.dumps(contents[shape], protocol=protocol))
    loaded = stored.load(path)
    assert [item.kv_cache_id for item in loaded] == ["0", "1"]
    for seed, item in enumerate(loaded):
        assert item.metadata.fingerprint is None
        assert item.metadata.tokens.source == TEXT and item.metadata.tokens.token_ids == ()
        assert item.metadata.extracted_at == datetime.datetime(2025, 7, 1, 12)
        assert item.metadata.textual_memory is not None and item.metadata.textual_memory.metadata == {"tags": ["dial"]}
        assert item.kv_cache.get_seq_length() == 6
        assert stored.same_tensors(item.kv_cache, cache(seed))


def test_memos_older_files_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, OldItem)
    pairs = layers_of(cache())
    old = OldItem(kv_cache_id="old", kv_cache=old_cache(pairs), metadata={"source_text": TEXT})
    path.write_bytes(pickle.dumps({"kv_cache_memories": {"old": old}}))
    (item,) = stored.load(path)
    assert (item.kv_cache_id, item.metadata.source_text, item.metadata.fingerprint) == ("old", TEXT, None)
    assert layers_of(item.kv_cache)[1][1].equal(pairs[1][1])


def test_a_bfloat16_file_is_read_by_a_bfloat16_model(memos: types.ModuleType, path: Path) -> None:
    half = from_layers([(k.bfloat16(), v.bfloat16()) for k, v in layers_of(cache())], stored.CONFIG)
    path.write_bytes(pickle.dumps({"kv_cache_memories": {"h": KVCacheItem(id="h", memory=half)}}))
    (item,) = stored.load(path, stored.FINGERPRINT.model_copy(update={"dtype": "bfloat16"}))
    assert layers_of(item.kv_cache)[0][0].equal(layers_of(half)[0][0])
    with pytest.raises(FingerprintError, match="dtype: float32 here, bfloat16 there"):
        stored.load(path)


@pytest.mark.parametrize("field", ["layers", "kv_heads", "head_dim"])
def test_another_shape_is_refused(memos: types.ModuleType, path: Path, field: str) -> None:
    path.write_bytes(pickle.dumps({"kv_cache_memories": {"a": KVCacheItem(id="a", memory=cache())}}))
    with pytest.raises(FingerprintError, match=f"item a can't be from this model: {field}"):
        stored.load(path, stored.FINGERPRINT.model_copy(update={field: 3}))


def test_an_empty_cache_is_refused(memos: types.ModuleType, path: Path) -> None:
    path.write_bytes(pickle.dumps({"kv_cache_memories": {"a": KVCacheItem(id="a", memory=DynamicCache())}}))
    with pytest.raises(DamagedFileError, match="no keys and values"):
        stored.load(path)


def test_memos_can_read_a_file_of_kvmem(memos: types.ModuleType, path: Path) -> None:
    """With an ordinary unpickler, copies of MemOS's classes, and the real DynamicCache."""
    ours = stored.item("a", seed=3)
    stored.dump(path, ours)
    with open(path, "rb") as file:
        theirs = pickle.load(file)["kv_cache_memories"]["a"]
    assert (type(theirs), type(theirs.memory), type(theirs.records)) == (KVCacheItem, DynamicCache, KVCacheRecords)
    assert theirs.id == "a" and theirs.metadata["source_text"] == ours.metadata.source_text
    assert theirs.records.timestamp == ours.metadata.extracted_at
    assert theirs.memory.get_seq_length() == 6
    assert layers_of(theirs.memory)[1][0].equal(layers_of(ours.kv_cache)[1][0])


class Runs:
    """A pickle that calls `function(*args)` when an ordinary unpickler reads it."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def test_a_pickle_with_any_other_name_is_refused_before_it_runs(path: Path, tmp_path: Path) -> None:
    import builtins
    import os

    proof = tmp_path / "ran"
    calls = {
        f"{os.system.__module__}.system": Runs(os.system, f"touch {proof}"),
        "builtins.eval": Runs(eval, f"open({str(proof)!r}, 'w')"),
        "builtins.getattr": Runs(getattr, "", "join"),
        "subprocess.Popen": Runs(subprocess.Popen, ["touch", str(proof)]),
        "torch.serialization.load": Runs(torch.load, io.BytesIO(b"")),
        "builtins.__import__": Runs(builtins.__import__, "this"),
    }
    for name, call in calls.items():
        for contents in (call, {"kv_cache_memories": {"a": call}}, {"kv_cache_memories": [], "other": [call]}):
            path.write_bytes(pickle.dumps(contents))
            with pytest.raises(UnsafeFileError, match=name):
                stored.load(path)
    assert not proof.exists()


def test_tensor_bytes_that_run_code_are_refused(path: Path, tmp_path: Path) -> None:
    """torch.storage._load_from_bytes itself unpickles any bytes."""
    import os

    proof = tmp_path / "ran"
    for legacy in (True, False):
        inner = io.BytesIO()
        torch.save(Runs(os.system, f"touch {proof}"), inner, _use_new_zipfile_serialization=not legacy)
        for raw in (inner.getvalue(), pickle.dumps(Runs(os.system, f"touch {proof}"))):
            path.write_bytes(pickle.dumps(Runs(torch.storage._load_from_bytes, raw)))
            with pytest.raises(StorageError, match="system" if raw == inner.getvalue() else None):
                stored.load(path)
    assert not proof.exists()
    torch.storage._load_from_bytes(inner.getvalue())
    assert proof.exists(), "the attack is real: torch's own function runs it"


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(path: Path) -> None:
    """Read without a check, it would expose the memory behind the storage."""
    raw = torch.zeros(4).untyped_storage()
    storage = torch.storage.TypedStorage(wrap_storage=raw, dtype=torch.float32, _internal=True)
    for offset, size, stride in ((0, (5,), (1,)), (1, (2, 2), (2, 1)), (0, (2,), (-1,)), (-1, (1,), (1,))):
        rebuild = Runs(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, collections.OrderedDict())
        path.write_bytes(pickle.dumps(rebuild))
        with pytest.raises(DamagedFileError, match="beyond its storage"):
            stored.load(path)


def test_a_pickle_can_not_affect_the_next_one(path: Path) -> None:
    """The opcode BUILD on a class would set its attributes."""
    for name in (b"transformers.cache_utils\nDynamicCache", b"torch._utils\n_rebuild_tensor_v2", b"torch\ndevice"):
        path.write_bytes(b"\x80\x02c" + name + b"\nN}X\x06\x00\x00\x00fieldsNs\x86b.")
        with pytest.raises(DamagedFileError):
            stored.load(path)
    assert isinstance(safe_unpickler.Cache().fields, dict)


def test_every_allowed_name_exists() -> None:
    """A class that transformers or torch renames fails here, and not with a user's file."""
    for module, name in safe_unpickler.ALLOWED:
        if module == "transformers.cache_utils":
            assert hasattr(transformers.cache_utils, name)
        if module.startswith("torch"):
            target: Any = torch
            for part in [*module.split(".")[1:], name]:
                target = getattr(target, part)
