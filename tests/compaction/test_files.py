"""Compacted memories in files: bit by bit, at the bytes that they have, and refused if a file contradicts itself."""

from __future__ import annotations

import json

import pytest
import torch
import xxhash

from kvmem.cache import BIAS, dynamic_cache
from kvmem.errors import DamagedFileError, StorageError
from kvmem.storage import manifest, read_head
from kvmem.storage.safetensors_file import LENGTH_BYTES, NO_CHECKSUM, START
from tests.compaction.strategies import Doubled, Uneven
from tests.helpers.architectures import copy_of_contents, has_contents
from tests.helpers.tiny import memory_on, pairs

((TEXT, QUERY),) = pairs(1, characters=400, seed=7)


@pytest.mark.parametrize("copy_files", [False, True])
@pytest.mark.parametrize("strategy", ["Knorm", Uneven(), Doubled()], ids=str)
def test_a_file_gives_back_the_same_item(qwen3, tmp_path, strategy, copy_files):
    memory = memory_on(qwen3, copy_files=copy_files)
    items = [memory.extract(TEXT), memory.extract(TEXT, compaction=strategy)]
    memory.add(items)
    answer = qwen3.generate(QUERY, memory.get_cache(items[1].kv_cache_id), 8)
    path = memory.dump(tmp_path)
    assert memory.load(tmp_path) == 2
    whole, loaded = memory.get_all()
    assert has_contents(loaded, copy_of_contents(items[1])) and loaded.metadata == items[1].metadata
    assert has_contents(whole, copy_of_contents(items[0])) and whole.metadata.compaction is None
    assert qwen3.generate(QUERY, memory.get_cache(loaded.kv_cache_id), 8) == answer
    body = sum(item.metadata.kv_bytes for item in items)
    assert body == sum(dynamic_cache.nbytes(item.kv_cache) for item in items) == read_head(path).kv_bytes


def test_heads_are_stored_at_their_own_length(qwen3, tmp_path):
    memory = memory_on(qwen3)
    item = memory.extract(TEXT, compaction=Uneven())
    entries = sum(map(sum, item.metadata.compaction.entries))
    assert item.metadata.kv_bytes == entries * 2 * qwen3.fingerprint.head_dim * torch.float32.itemsize
    assert len({length for heads in item.metadata.compaction.entries for length in heads}) > 2
    biased = memory.extract(TEXT, compaction=Doubled())
    assert all(BIAS in kept for kept in dynamic_cache.contents_of(biased.kv_cache))
    memory.add(item)
    size = memory.dump(tmp_path).stat().st_size
    assert item.metadata.kv_bytes < size < item.metadata.kv_bytes + 8192  # the header


def version_of(path) -> int:
    return json.loads(read_fields(path)["__metadata__"]["manifest"])["version"]


def read_fields(path):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:LENGTH_BYTES], "little")
    return json.loads(raw[LENGTH_BYTES : LENGTH_BYTES + length])


def test_only_a_file_with_a_compacted_memory_has_the_new_version(qwen3, tmp_path):
    memory = memory_on(qwen3)
    memory.add(memory.extract(TEXT))
    assert version_of(memory.dump(tmp_path)) == manifest.KEYS_AND_VALUES_ONLY
    memory.add(memory.extract(TEXT, compaction="Knorm"))
    assert version_of(memory.dump(tmp_path)) == manifest.COMPACTED_VERSION


def rewritten(path, change) -> None:
    """Changes the manifest and seals the header again, as a faulty writer would."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:LENGTH_BYTES], "little")
    body = raw[LENGTH_BYTES + length :]
    fields = read_fields(path)
    stated = json.loads(fields["__metadata__"]["manifest"])
    change(stated)
    fields["__metadata__"]["manifest"] = json.dumps(stated)
    fields["__metadata__"]["checksum_of_head"] = NO_CHECKSUM.decode()
    header = json.dumps(fields, separators=(",", ":")).encode()
    header = len(header).to_bytes(LENGTH_BYTES, "little") + header
    at = LENGTH_BYTES + len(START)
    header = header[:at] + xxhash.xxh3_128_hexdigest(header).encode() + header[at + len(NO_CHECKSUM) :]
    path.write_bytes(header + body)


def _set(*keys, to):
    def change(stated):
        place = stated["items"][0]
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("metadata", "compaction", "entries", 0, 0, to=2), "for .*1, 1, "),
        (_set("metadata", "compaction", "entries", 0, to=[6]), "entries of .*, for 2 heads"),
        (_set("metadata", "compaction", "entries", 1, 0, to=0), "for 2 heads"),
        (_set("metadata", "compaction", "has_bias", to=True), "tensors named"),
        (_set("metadata", "compaction", to=None), "keep more than keys and values"),
        (_set("cache_tokens", to=7), "token ids for 7 tokens"),
        (lambda stated: stated.update(version=2), "a manifest that its version does not allow"),
        (lambda stated: stated.update(version=4), "reads up to version 3"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(qwen3, tmp_path, change, message):
    memory = memory_on(qwen3)
    memory.add(memory.extract(TEXT, compaction="Knorm"))
    path = memory.dump(tmp_path)
    rewritten(path, lambda stated: None)
    assert memory.load(tmp_path) == 1
    before = memory.get_all()
    rewritten(path, change)
    with pytest.raises(StorageError, match=message):
        memory.load(tmp_path)
    assert memory.get_all() == before


def test_a_flipped_bit_is_noticed(qwen3, tmp_path):
    memory = memory_on(qwen3)
    memory.add(memory.extract(TEXT, compaction="Knorm"))
    path = memory.dump(tmp_path)
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DamagedFileError):
        memory.load(tmp_path)
