"""Namespaces: a memory of another namespace is not found, listed, merged, extended, loaded, overwritten or deleted."""

from __future__ import annotations

import pytest

from kvmem import KVCacheMemoryConfig, TextualMemoryItem
from kvmem.errors import ConfigError, NamespaceError, StorageError, UnknownMemoryError
from kvmem.scheduler import MemScheduler
from kvmem.scheduler.cost_model import Costs
from tests.helpers.tiny import memory_on, pairs

TEXTS = [text for text, _ in pairs(3, characters=200, seed=11)]
TURNS = [{"role": "user", "content": "My dog is called Bodo."}, {"role": "assistant", "content": "A good name."}]


@pytest.fixture(params=["", "acme"], ids=["the default namespace", "a named one"])
def two(qwen3, request):
    """A memory with two items in its namespace, and an empty memory of another namespace."""
    ours, theirs = memory_on(qwen3, namespace="ours"), memory_on(qwen3, namespace=request.param)
    ours.add(ours.extract(TEXTS[:2]))
    return ours, theirs


def test_items_state_their_namespace(qwen3):
    memory = memory_on(qwen3, namespace="ours")
    items = [
        *memory.extract(TEXTS[:1]),
        memory.extract(TEXTS[0]),
        memory.extract(TURNS),
        memory.extract(TURNS, base=memory.extract(TURNS)),
        memory.from_textual_memory(TextualMemoryItem(memory=TEXTS[0])),
    ]
    assert {item.metadata.namespace for item in items} == {"ours"}
    assert memory_on(qwen3).extract(TEXTS[0]).metadata.namespace == ""


def test_another_namespace_does_not_find_list_merge_or_delete(two):
    ours, theirs = two
    ids = [item.kv_cache_id for item in ours.get_all()]
    assert theirs.get_all() == [] and theirs.get(ids[0]) is None and theirs.get_by_ids(ids) == [None, None]
    for wanted in (ids[0], ids):
        with pytest.raises(UnknownMemoryError):
            theirs.get_cache(wanted)
    assert theirs.delete(ids) == theirs.delete_all() == 0
    assert [item.kv_cache_id for item in ours.get_all()] == ids


def test_another_namespace_does_not_add_or_extend(two):
    ours, theirs = two
    item, own = ours.get_all()[0], theirs.extract(TEXTS[2])
    with pytest.raises(NamespaceError, match=rf"{item.kv_cache_id} belongs to the namespace 'ours'"):
        theirs.add([own, item])
    assert theirs.get_all() == []
    with pytest.raises(NamespaceError, match="'ours'"):
        theirs.extract(TURNS, base=item)


def test_two_namespaces_share_a_folder(two, tmp_path):
    ours, theirs = two
    ids = [item.kv_cache_id for item in ours.get_all()]
    path = ours.dump(tmp_path)
    with pytest.raises(StorageError, match="can't be read"):
        theirs.load(tmp_path)
    theirs.add(theirs.extract(TEXTS[2]))
    assert theirs.dump(tmp_path) != path
    assert ours.load(tmp_path) == 2 and [item.kv_cache_id for item in ours.get_all()] == ids
    assert theirs.load(tmp_path) == 1


@pytest.mark.parametrize("filename", ["memory.safetensors", "memory.pickle"])
def test_a_file_that_was_moved_to_another_namespace_is_refused(qwen3, tmp_path, filename):
    ours = memory_on(qwen3, namespace="ours", memory_filename=filename)
    theirs = memory_on(qwen3, namespace="theirs", memory_filename=filename)
    kept = theirs.extract(TEXTS[2])
    theirs.add(kept)
    ours.add(ours.extract(TEXTS[:2]))
    target = theirs.dump(tmp_path)
    ours.dump(tmp_path).replace(target)
    with pytest.raises(NamespaceError, match=str(target)):
        theirs.load(tmp_path)
    assert theirs.get_all() == [kept]


@pytest.mark.parametrize("name", ["..", "a/b", "/etc", ".hidden", "a\0b", "a b", "x" * 101, "ü", "a\n", "-a"])
def test_a_namespace_that_is_no_plain_name_is_refused(name):
    with pytest.raises(ConfigError, match="namespace"):
        KVCacheMemoryConfig(extractor_llm={"backend": "huggingface", "config": {}}, namespace=name)


def test_namespaces_that_differ_in_case_share_no_folder_on_any_disk(qwen3, tmp_path):
    """Some disks take "A" and "a" for one name."""
    names = ["acme", "Acme", "ACME", "acmE"]
    paths, costs = [], Costs.measured(qwen3)
    for name in names:
        memory = memory_on(qwen3, namespace=name)
        memory.add(memory.extract(TEXTS[0]))
        paths.append(memory.dump(tmp_path))
        budget = {"disk": 1 << 26, "cold": 1 << 26}
        with MemScheduler(memory, "lfu", budget, tmp_path / "s", costs, cold=f"file://{tmp_path}/c"):
            pass
    assert paths[0] == tmp_path / "acme" / "activation_memory.safetensors"
    for folder in (tmp_path, tmp_path / "s", tmp_path / "c"):
        found = {path.name.casefold() for path in folder.iterdir() if path.name.casefold().startswith("acme")}
        assert len(found) == len(names)
    for name in names:
        again = memory_on(qwen3, namespace=name)
        assert again.load(tmp_path) == 1 and again.get_all()[0].metadata.namespace == name


def test_schedulers_of_two_namespaces_share_a_folder(qwen3, tmp_path):
    text = TextualMemoryItem(id="one", memory=TEXTS[0])
    costs = Costs.measured(qwen3)

    def scheduler(namespace: str) -> MemScheduler:
        return MemScheduler(memory_on(qwen3, namespace=namespace), "lfu", {"disk": 1 << 26}, tmp_path, costs)

    with scheduler("ours") as ours, scheduler("theirs") as theirs:  # one folder belongs to one process at a time
        for _ in range(3):
            ours.observe([text], "Why?")
        ours.tick()
        assert ours.index.tiers() and not theirs.index.tiers()
    with scheduler("ours") as ours, scheduler("theirs") as theirs, scheduler("") as default:
        assert ours.index.tiers() and not theirs.index.tiers() and not default.index.tiers()
