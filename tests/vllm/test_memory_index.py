"""The index of a folder's memories, without an engine: what it finds and leaves out, and how it follows the folder."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from kvmem.cache import KVCacheItem
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.engines.vllm.connector.memory_index import MOST_HEADS, STEP_TOKENS, MemoryIndex
from kvmem.engines.vllm.connector.protocol import NO_LEASE, memory_name
from kvmem.storage import SafetensorsFile
from tests.helpers.tiny import pairs

TEXTS = [text for text, _ in pairs(3, 900, seed=5)]
LATER_NS = 10**12


@pytest.fixture(scope="module")
def items(qwen3: HFBackend) -> list[KVCacheItem]:
    """Two texts, and the first of them with more behind it."""
    return [qwen3.build(text) for text in (*TEXTS[:2], f"{TEXTS[0]} {TEXTS[2]}")]


def put(item: KVCacheItem, folder: Path, namespace: str = "", **changed: object) -> str:
    """Writes an item to a new file, with other metadata. Returns the file's name."""
    name = memory_name(namespace, NO_LEASE)
    metadata = item.metadata.model_copy(update=changed)
    SafetensorsFile().dump(folder / name, [KVCacheItem(item.kv_cache, metadata, item.kv_cache_id)])
    return name


def ids_of(item: KVCacheItem) -> list[int]:
    return list(item.metadata.tokens.token_ids)


def index_of(engine: HFBackend, folder: Path) -> MemoryIndex:
    index = MemoryIndex(folder, engine.fingerprint, lambda: time.time_ns() + LATER_NS)
    index.refresh(None)
    return index


def test_the_longest_memory_is_found_token_by_token(qwen3: HFBackend, items: list[KVCacheItem], tmp_path: Path) -> None:
    short, other, long = (put(item, tmp_path) for item in items)
    index, ids = index_of(qwen3, tmp_path), ids_of(items[0])
    assert index.find("", [*ids_of(items[2]), 7]).name == long
    assert index.find("", [*ids_of(items[1]), 7]).name == other
    found = index.find("", [*ids, 7, 7])
    assert found.tokens >= len(ids) - 4 and found.name == short  # the last tokens may depend on what follows
    whole = index.find("", ids_of(items[1]))  # nothing behind it: the last token's logits are needed
    assert (whole.name, whole.tokens) == (other, len(ids_of(items[1])) - 1)
    changed = len(ids) // 2 + 3
    assert index.find("", [*ids[:changed], 7, *ids[changed + 1 :]]).tokens == changed
    little = index.find("", [*ids[: STEP_TOKENS + 1], 7])
    assert not little.name and f"share {STEP_TOKENS + 1} tokens" in little.reason
    for prompt in ([7, *ids], ids[: STEP_TOKENS - 1], [7], []):
        missed = index.find("", prompt)
        assert (missed.name, missed.tokens) == ("", 0) and "No memory begins" in missed.reason


def test_a_namespace_finds_its_own_only(qwen3: HFBackend, items: list[KVCacheItem], tmp_path: Path) -> None:
    names = {namespace: put(items[0], tmp_path, namespace) for namespace in ("", "acme")}
    index, prompt = index_of(qwen3, tmp_path), [*ids_of(items[0]), 7]
    assert {namespace: index.find(namespace, prompt).name for namespace in names} == names
    assert "has no memory" in index.find("other", prompt).reason


def test_only_files_with_a_prefills_keys_and_values_are_found(
    qwen3: HFBackend, items: list[KVCacheItem], tmp_path: Path
) -> None:
    item, prompt = items[0], [*ids_of(items[0]), 7]
    tokens = item.metadata.tokens
    other = qwen3.fingerprint.model_copy(update={"weights": "others"})
    left_out = [
        put(item, tmp_path, lossy="merged by RopeShift"),
        put(item, tmp_path, fingerprint=None),
        put(item, tmp_path, fingerprint=other),
        put(item, tmp_path, tokens=tokens.model_copy(update={"lead_ids": (1,)})),
    ]
    damaged = put(item, tmp_path)
    with open(tmp_path / damaged, "r+b") as file:
        file.seek(200)
        file.write(b"damage")
    index = index_of(qwen3, tmp_path)
    assert index.memories == 0 and not index.find("", prompt).name
    reasons = [index.files[name].reason for name in (*left_out, damaged)]
    assert "weights" in reasons[2] and "damaged" in reasons[4] and all("merged" in reasons[i] for i in (0, 1, 3))


def test_it_follows_the_folder(qwen3: HFBackend, items: list[KVCacheItem], tmp_path: Path) -> None:
    index, prompts = index_of(qwen3, tmp_path), [[*ids_of(item), 7] for item in items]
    for _ in range(3):
        index.refresh()
    assert index.scans == 1, "a folder that has not changed is not listed again"
    name = put(items[0], tmp_path)
    index.refresh()
    assert index.find("", prompts[0]).name == name
    SafetensorsFile().dump(tmp_path / name, [items[1]])  # replaced under its name
    index.refresh()
    assert index.find("", prompts[1]).name == name and not index.find("", prompts[0]).name
    (tmp_path / name).unlink()
    index.refresh()
    assert not index.find("", prompts[1]).name and index.memories == index.kv_bytes == 0
    assert not any(index.nodes.values()), "nothing is left of a deleted file"


def test_many_new_files_are_read_a_few_at_a_time(qwen3: HFBackend, items: list[KVCacheItem], tmp_path: Path) -> None:
    index = index_of(qwen3, tmp_path)
    first = put(items[0], tmp_path)
    for _ in range(MOST_HEADS):
        os.link(tmp_path / first, tmp_path / memory_name("", NO_LEASE))
    index.refresh()
    assert index.memories == MOST_HEADS
    index.refresh()
    assert index.memories == MOST_HEADS + 1


def test_a_file_that_could_not_be_injected_is_tried_again_later(
    qwen3: HFBackend, items: list[KVCacheItem], tmp_path: Path
) -> None:
    now = [time.time_ns() + LATER_NS]
    name, prompt = put(items[0], tmp_path), [*ids_of(items[0]), 7]
    index = MemoryIndex(tmp_path, qwen3.fingerprint, lambda: now[0])
    index.refresh()
    index.leave_out(name, "The disk failed.")
    index.refresh()
    assert not index.find("", prompt).name and index.files[name].reason == "The disk failed."
    now[0] += 61 * 10**9
    index.refresh()
    assert index.find("", prompt).name == name


def test_a_folder_that_has_just_changed_is_listed_again(
    qwen3: HFBackend, items: list[KVCacheItem], tmp_path: Path
) -> None:
    """Two changes may have one time, on a disk whose clock is coarse."""
    index = MemoryIndex(tmp_path, qwen3.fingerprint)
    put(items[0], tmp_path)
    index.refresh()
    at = tmp_path.stat()
    name = put(items[1], tmp_path)
    os.utime(tmp_path, ns=(at.st_atime_ns, at.st_mtime_ns))
    index.refresh()
    assert index.find("", [*ids_of(items[1]), 7]).name == name
