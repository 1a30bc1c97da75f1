"""Conversations as memories: they grow, and their earlier turns' KV is the beginning of the later prompt's."""

from __future__ import annotations

from typing import Any

from kvmem.cache import DialogueMemoryItem, Message, Source, TextualMemoryItem
from kvmem.prompt import Query


def text_memory(fields: dict[str, Any]) -> TextualMemoryItem:
    """A text memory or a dialogue from its fields, as a file has them. Raises ArgumentError or TypeError."""
    kind = DialogueMemoryItem if isinstance(dict(**fields).get("memory"), list | tuple) else TextualMemoryItem
    return kind(**fields)


def extends(text: Source, earlier: Source) -> bool:
    """Whether a memory's text is another one, or begins with its turns: a dialogue that has grown.

    >>> extends(({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}),
    ...         ({"role": "user", "content": "Hi"},))
    True
    """
    if isinstance(text, str) or isinstance(earlier, str):
        return text == earlier
    return tuple(text[: len(earlier)]) == tuple(earlier)


def turns_of(query: Query) -> tuple[Message, ...]:
    """The turns of a query."""
    return ({"role": "user", "content": query},) if isinstance(query, str) else tuple(query)


def system_text(memory: TextualMemoryItem) -> str | None:
    """What a dialogue's first turn says as system turn; None if it has none, or is no dialogue."""
    if not isinstance(memory, DialogueMemoryItem) or memory.memory[0]["role"] != "system":
        return None
    return memory.memory[0]["content"]
