"""Calls with a wrong kind, a wrong model or a missing id: an error of kvmem that says so, and nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import DynamicCache

from kvmem import KVCacheItem, KVCacheMemory, TextualMemoryItem
from kvmem.errors import ArgumentError, FingerprintError, PromptError, StorageError, UnknownMemoryError
from tests.helpers.tiny import kind, memory_on, pairs

TEXT, OTHER = (text for text, _ in pairs(2, characters=300, seed=7))
TURNS = [{"role": "user", "content": "Who is Bodo?"}, {"role": "assistant", "content": "My dog."}]
NO_IDS: list[Any] = [None, 3, b"id", [3], [None], [["id"]], {"id", 4}]
NO_FOLDERS: list[Any] = [None, 3, b"here"]
OTHER_FAMILIES = ["qwen2", "llama", "mistral"]  # another head size; more layers too; fewer heads, which would broadcast


# extract, from_textual_memory


@pytest.mark.parametrize("given", [None, 3, {"role": "user", "content": "x"}, {TEXT}, iter([TEXT])], ids=kind)
def test_extract_of_anything_but_a_text(stored, given):
    with pytest.raises(PromptError, match=f"extract takes a text.* got a {type(given).__name__}"):
        stored.extract(given)


@pytest.mark.parametrize(
    "turn", [{"role": "user", "content": None}, {"role": 1, "content": "x"}, b"x", ["x"]], ids=kind
)
def test_extract_of_anything_but_a_turn(stored, turn):
    with pytest.raises(PromptError, match="A turn is"):
        stored.extract([turn])


@pytest.mark.parametrize("base", ["an id", 3, DynamicCache()], ids=kind)
def test_extract_with_a_base_that_is_not_an_item(stored, base):
    with pytest.raises(ArgumentError, match=f"base has to be KVCacheItem or None, not {type(base).__name__}"):
        stored.extract(TURNS, base=base)


@pytest.mark.parametrize("given", [None, 3, TEXT, {"memory": TEXT}, [TextualMemoryItem(memory=TEXT)]], ids=kind)
def test_from_textual_memory_of_anything_but_a_text_memory(stored, given):
    with pytest.raises(ArgumentError, match=r"Give TextualMemoryItem\(memory=text\)"):
        stored.from_textual_memory(given)


@pytest.mark.parametrize("source", [3, ["x"], [{"role": "user"}]], ids=kind)
def test_build_of_anything_but_a_source(qwen3, source):
    with pytest.raises(PromptError, match=r"A memory is a text|A turn is"):
        qwen3.build(source)


# add


@pytest.mark.parametrize(
    "given", [None, 3, "text", ["x"], [None], DynamicCache(), TextualMemoryItem(memory=TEXT)], ids=kind
)
def test_add_of_anything_but_an_item(stored, given):
    if isinstance(given, DynamicCache):
        given = stored.get_all()[0].kv_cache  # which can be gone through, layer by layer
    with pytest.raises(ArgumentError, match=r"What add stores has to be KVCacheItem, not .* extract"):
        stored.add(given)


def test_add_is_all_or_nothing_if_one_is_not_an_item(stored):
    with pytest.raises(ArgumentError, match="not str"):
        stored.add([stored.extract(OTHER), "x"])


@pytest.mark.parametrize("part", ["kv_cache", "metadata", "kv_cache_id"])
def test_an_item_of_wrong_parts_can_not_be_made(stored, part):
    item = stored.extract(OTHER)
    parts = {"kv_cache": item.kv_cache, "metadata": item.metadata, "kv_cache_id": "an id"} | {part: 3}
    with pytest.raises(ArgumentError, match=f"An item's {part} has to be .*, not int"):
        KVCacheItem(**parts)


@pytest.mark.parametrize("family_name", OTHER_FAMILIES)
@pytest.mark.parametrize("verified", [True, False], ids=["verified", "unverified"])
def test_add_of_another_models_item(stored, tiny, family_name, verified):
    item = memory_on(tiny(family_name)).extract(OTHER)
    if not verified:
        item.metadata = item.metadata.model_copy(update={"fingerprint": None})
    expected = "architecture:" if verified else r"(layers|kv_heads|head_dim): \d+ here, \d+ there"
    with pytest.raises(FingerprintError, match=f"Item {item.kv_cache_id} .*{expected}.* Extract it again"):
        stored.add(item)


# get, get_by_ids, get_cache, delete


@pytest.mark.parametrize("ids", NO_IDS, ids=kind)
@pytest.mark.parametrize("verb", ["get_by_ids", "get_cache", "delete"])
def test_anything_but_an_id(stored, verb, ids):
    with pytest.raises(ArgumentError, match=f"An id that {verb} takes has to be str, not .* kv_cache_id"):
        getattr(stored, verb)(ids)


@pytest.mark.parametrize("verb", ["get", "get_by_ids", "get_cache", "delete"])
def test_an_item_is_not_an_id(stored, verb):
    with pytest.raises(ArgumentError, match=r"has to be str, not KVCacheItem. An item's id is its kv_cache_id"):
        getattr(stored, verb)(stored.get_all()[0])


@pytest.mark.parametrize("id_", [None, 3, ["id"], {}], ids=kind)
def test_get_of_anything_but_an_id(stored, id_):
    with pytest.raises(ArgumentError, match="has to be str"):
        stored.get(id_)


def test_get_by_ids_of_one_text_is_refused_and_not_taken_letter_by_letter(stored):
    with pytest.raises(ArgumentError, match=r"got 'one-id'. Use get, or give a list"):
        stored.get_by_ids("one-id")


@pytest.mark.parametrize("missing", ["no-such-id", ["no-such-id"], [""], ""], ids=kind)
def test_get_cache_of_an_unknown_id(stored, missing):
    with pytest.raises(UnknownMemoryError, match=r"Not stored: (no-such-id|'')\. Stored: 1 items"):
        stored.get_cache(missing)


def test_get_cache_of_a_text_memorys_id_names_its_items(qwen3):
    memory = memory_on(qwen3)
    memory.add([memory.from_textual_memory(TextualMemoryItem(id="hours", memory=text)) for text in (TEXT, OTHER)])
    hints = [f"hours is a text memory's id, and its item is {item.kv_cache_id}." for item in memory.get_all()]
    with pytest.raises(UnknownMemoryError) as refused:
        memory.get_cache("hours")
    assert str(refused.value) == f"Not stored: hours. Stored: 2 items, see get_all(). {' '.join(hints)}"


def test_delete_of_an_unknown_id_returns_zero(stored):
    assert stored.delete("no-such-id") == stored.delete(["no-such-id"]) == stored.delete([]) == 0


# dump, load


@pytest.mark.parametrize("folder", NO_FOLDERS, ids=kind)
@pytest.mark.parametrize("verb", ["dump", "load"])
def test_anything_but_a_folder(stored, verb, folder):
    with pytest.raises(ArgumentError, match="A folder has to be str or PathLike, not"):
        getattr(stored, verb)(folder)


@pytest.mark.parametrize("verb", ["dump", "load"])
@pytest.mark.parametrize("why", ["a file", "below a file", "a null character", "a folder of the file's name"])
def test_a_folder_that_can_not_be(stored, tmp_path, verb, why):
    (tmp_path / "file").write_text("kept")
    (tmp_path / stored.config.memory_filename).mkdir()
    folder = {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "deeper",
        "a null character": "a\0b",
        "a folder of the file's name": tmp_path,
    }[why]
    with pytest.raises(StorageError):
        getattr(stored, verb)(folder)
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["activation_memory.safetensors", "file"]


# the constructor


def test_a_memory_of_a_wrong_kind(stored, qwen3):
    with pytest.raises(ArgumentError, match="Give KVCacheMemoryConfig"):
        KVCacheMemory({"extractor_llm": {}}, qwen3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="backend has to be Backend or None, not str"):
        KVCacheMemory(stored.config, "huggingface")  # type: ignore[arg-type]


def test_paths_are_taken_as_text_too(stored, tmp_path):
    assert stored.dump(str(tmp_path)) == Path(tmp_path) / "activation_memory.safetensors"
