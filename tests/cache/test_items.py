"""Items and text memories: repr, validation, copies."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from kvmem import TextualMemoryItem
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import ArgumentError
from tests.helpers.tiny import memory_on


def test_the_repr_of_an_item_is_one_line(qwen3: HFBackend) -> None:
    memory = memory_on(qwen3)
    short, long = memory.extract("Open at 9."), memory.extract("Open at 9.\n" * 50)
    assert repr(short).endswith("'Open at 9.')") and repr(short.kv_cache_id) in repr(short)
    assert f"{long.metadata.token_count} tokens" in repr(long) and repr(long).endswith("…')")
    assert "\n" not in repr(long) and len(repr(long)) < 150


WRONG: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    (("some text",), {}, "takes its fields by name, not by position"),
    ((), {}, "TextualMemoryItem: 'memory' is missing."),
    ((), {"memory": 3}, r"TextualMemoryItem\.memory: .*\(got 3\)"),
    ((), {"memory": "a", "id": 3}, r"TextualMemoryItem\.id: .*\(got 3\)"),
    ((), {"memory": "a", "metadata": None}, r"TextualMemoryItem\.metadata: .*\(got None\)"),
    ((), {"memory": "a", "metdata": {}}, "unknown key 'metdata'. Did you mean metadata?"),
]


@pytest.mark.parametrize(("positional", "fields", "match"), WRONG, ids=[str(wrong[:2]) for wrong in WRONG])
def test_a_text_memory_with_wrong_fields_is_refused(
    positional: tuple[Any, ...], fields: dict[str, Any], match: str
) -> None:
    with pytest.raises(ArgumentError, match=rf"{match}.* Give TextualMemoryItem\(memory=text\)"):
        TextualMemoryItem(*positional, **fields)


def test_a_text_memory_can_be_copied_and_pickled() -> None:
    memory = TextualMemoryItem(id="a", memory="Open at 9.", metadata={"from": "door"})
    assert TextualMemoryItem.model_validate_json(memory.model_dump_json()) == memory
    assert pickle.loads(pickle.dumps(memory)) == memory.model_copy(deep=True) == memory
    with pytest.raises(ArgumentError, match="'memory' is missing"):
        TextualMemoryItem.model_validate({"id": "a"})
