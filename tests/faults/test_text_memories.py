"""What a file can't keep is refused where it enters: text that is no Unicode, metadata that is no JSON."""

from __future__ import annotations

import copy
import enum
import json
from collections import OrderedDict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvmem import TextualMemoryItem
from kvmem.cache import TextualSource
from kvmem.engines.huggingface import HFBackend
from kvmem.errors import ArgumentError, PromptError, StorageError
from tests.helpers.tiny import memory_on
from tests.scheduler.test_scheduler import MEMORIES, QUERY, as_text, scheduler_on, use

SURROGATE = "Open at 9 \ud800 on Mondays and Tuesdays."


class Kind(enum.StrEnum):
    FAQ = "faq"


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


NOT_KEPT: dict[str, Any] = {
    "numpy vector": np.zeros(3),
    "numpy number": np.float64(1.5),
    "tensor": torch.zeros(2),
    "NaN": float("nan"),
    "infinity": [1.0, {"a": float("-inf")}],
    "tuple": {"a": (1, 2)},
    "datetime": datetime.now(UTC),
    "bytes": b"x",
    "set": {1},
    "enum": Kind.FAQ,
    "key": {1: "a"},
    "key that is no Unicode": {"\udfff": 1},
    "text that is no Unicode": ["\ud800"],
    "dict of another type": OrderedDict(a=1),
    "depth": deep(150),
    "huge integer": 10**5000,
}
KEPT: list[Any] = [
    None,
    True,
    0,
    -(2**80),
    0.1,
    1e308,
    -0.0,
    "é\0\U0001f600",
    [1, [2.5, {"": None}]],
    {"a": {"b": []}},
    deep(90),
]


def wide(name: str) -> dict[str, Any]:
    return {"outer": [{"inner": NOT_KEPT[name]}]}


@pytest.mark.parametrize("name", NOT_KEPT)
def test_metadata_that_a_file_would_change_is_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match=r"metadata\['outer'\]\[0\]\['inner'\].*Convert it to plain JSON values"):
        TextualMemoryItem(memory="Open at 9.", metadata=wide(name))


@pytest.mark.parametrize("field", ["id", "memory"])
def test_text_that_is_no_unicode_is_refused(field: str) -> None:
    with pytest.raises(ArgumentError, match=rf"TextualMemoryItem\.{field}: it has a lone surrogate, U\+D800 at char"):
        TextualMemoryItem(**{"memory": "Open at 9.", field: SURROGATE})


@pytest.mark.parametrize("suffix", ["safetensors", "pickle"])
def test_a_file_gives_back_what_it_was_given(qwen3: HFBackend, tmp_path: Path, suffix: str) -> None:
    memory = memory_on(qwen3, memory_filename=f"memory.{suffix}")
    metadata = {f"key {i}": value for i, value in enumerate(KEPT)}
    memory.add(memory.from_textual_memory(TextualMemoryItem(memory=MEMORIES[0].memory, metadata=metadata)))
    before = copy.deepcopy(metadata)
    memory.dump(tmp_path)
    memory.load(tmp_path)
    (item,) = memory.get_all()
    assert item.metadata.textual_memory is not None
    assert json.dumps(item.metadata.textual_memory.metadata) == json.dumps(before)


@pytest.mark.parametrize("suffix", ["safetensors", "pickle"])
@pytest.mark.parametrize("name", NOT_KEPT)
def test_dump_refuses_what_it_would_change(qwen3: HFBackend, tmp_path: Path, name: str, suffix: str) -> None:
    """Metadata can change after it was checked: a dictionary is the caller's. The file that was there stays."""
    memory = memory_on(qwen3, memory_filename=f"memory.{suffix}")
    item = memory.extract(MEMORIES[0].memory)
    memory.add(item)
    path = memory.dump(tmp_path)
    written = path.read_bytes()
    item.metadata = item.metadata.model_copy(update={"textual_memory": TextualSource(id="a", metadata=wide(name))})
    with pytest.raises(
        StorageError, match=rf"{item.kv_cache_id} can't be written: metadata\['outer'\]\[0\]\['inner'\]"
    ):
        memory.dump(tmp_path)
    assert path.read_bytes() == written and list(tmp_path.iterdir()) == [path]


def test_every_verb_that_takes_a_text_refuses_a_lone_surrogate(qwen3: HFBackend) -> None:
    memory = memory_on(qwen3)
    turns = [{"role": "user", "content": SURROGATE}]
    for call in (
        lambda: memory.extract(SURROGATE),
        lambda: memory.extract([MEMORIES[0].memory, SURROGATE]),
        lambda: memory.extract(turns),
        lambda: qwen3.generate(SURROGATE),
        lambda: qwen3.generate(turns),
    ):
        with pytest.raises(PromptError, match=r"has a lone surrogate, U\+D800 at character 10"):
            call()


def test_an_item_keeps_a_text_memory_of_its_own(qwen3: HFBackend) -> None:
    given = TextualMemoryItem(memory=MEMORIES[0].memory, metadata={"tags": ["a"]})
    item = memory_on(qwen3).from_textual_memory(given)
    given.metadata["tags"].append("of the caller, afterwards")
    assert item.metadata.textual_memory == TextualSource(id=given.id, metadata={"tags": ["a"]})


@pytest.mark.parametrize("name", NOT_KEPT)
def test_what_was_assigned_to_a_text_memory_is_checked_when_it_is_built(qwen3: HFBackend, name: str) -> None:
    given = TextualMemoryItem(memory=MEMORIES[0].memory)
    given.metadata["assigned"] = NOT_KEPT[name]
    with pytest.raises(ArgumentError, match="metadata"):
        memory_on(qwen3).from_textual_memory(given)


@pytest.mark.parametrize("field", ["memory", "metadata"])
def test_one_bad_memory_never_stops_the_others(qwen3: HFBackend, tmp_path: Path, field: str) -> None:
    """A memory that becomes bad after it was made is refused by the scheduler, and the others are built."""
    scheduler = scheduler_on(qwen3, tmp_path)
    bad = MEMORIES[1].model_copy(deep=True)
    setattr(bad, field, SURROGATE if field == "memory" else wide("numpy vector"))
    for call in (
        lambda: scheduler.observe(bad, QUERY),
        lambda: scheduler.observe([MEMORIES[0], bad], QUERY),
        lambda: scheduler.answer(QUERY, [bad], 2),
        lambda: scheduler.update(bad),
    ):
        with pytest.raises(ArgumentError, match=r"lone surrogate|is a ndarray"):
            call()
    use(scheduler, MEMORIES[0], 6)
    assert [move.memory_id for move in scheduler.tick()] == ["m0"] and list(scheduler.index.texts) == ["m0"]
    scheduler.close()
    again = scheduler_on(qwen3, tmp_path)
    assert list(again.index.texts.values()) == [MEMORIES[0]]
    again.close()


def test_the_scheduler_keeps_a_memory_of_its_own(qwen3: HFBackend, tmp_path: Path) -> None:
    """What a caller does to a memory afterwards reaches the scheduler with the next call, and not before."""
    scheduler = scheduler_on(qwen3, tmp_path)
    memory = MEMORIES[0].model_copy(deep=True, update={"metadata": {"tags": ["a"]}})
    use(scheduler, memory, 6)
    assert [move.kind for move in scheduler.tick()] == ["build"]
    memory.metadata["tags"].append(np.zeros(3))
    scheduler.observations.snapshot(every=0)
    assert scheduler.index.texts["m0"].metadata == {"tags": ["a"]}
    memory.metadata, memory.memory = {}, MEMORIES[1].memory
    scheduler.update(memory)
    assert scheduler.index.tiers() == {} and scheduler.index.texts["m0"].memory == MEMORIES[1].memory
    assert scheduler.answer(QUERY, [memory], 8).token_ids == as_text(qwen3, memory)
    scheduler.close()
