"""The ids of several namespaces in one scheduler: a memory of another namespace has another id, whatever its name."""

from __future__ import annotations

import json
from collections.abc import Sequence

from kvmem.cache import TextualMemoryItem
from kvmem.config import check_namespace
from kvmem.errors import ArgumentError

SEPARATOR = "\N{SYMBOL FOR UNIT SEPARATOR}"
"""Stands between namespace and id. No namespace contains it, and no id may."""


def qualified(id_: str, namespace: str | None, own: str) -> str:
    """The scheduler's id of a memory: with its namespace in front, unless it is the scheduler's own one (or None).

    Raises ArgumentError for an id with the separator, and ConfigError for a name that is no namespace.

    >>> qualified("faq", "acme", ""), qualified("faq", None, "")
    ('acme␟faq', 'faq')
    """
    if SEPARATOR in id_:
        raise ArgumentError(f"The id {id_!r} contains {SEPARATOR!r}, which separates namespaces. Give another id.")
    if namespace is None or namespace == own:
        return id_
    check_namespace(namespace)
    return f"{namespace}{SEPARATOR}{id_}"


def in_namespace(memories: Sequence[TextualMemoryItem], namespace: str | None, own: str) -> list[TextualMemoryItem]:
    """Copies of these memories under the scheduler's ids."""
    return [memory.model_copy(update={"id": qualified(memory.id, namespace, own)}) for memory in memories]


def namespace_of(id_: str, own: str) -> str:
    """The namespace of a scheduler's id, of a memory or a group."""
    return shown(id_, own)[0]


def shown(id_: str, own: str) -> tuple[str, str]:
    """(namespace, id as the user gave it) of a memory or a group.

    >>> shown('["acme␟faq", "acme␟prices"]', ""), shown("faq", "own")
    (('acme', '["faq", "prices"]'), ('own', 'faq'))
    """
    if SEPARATOR not in id_:
        return own, id_
    namespace, _, name = id_.partition(SEPARATOR)
    if not namespace.startswith('["'):
        return namespace, name
    members = [member.partition(SEPARATOR) for member in json.loads(id_)]
    return members[0][0], json.dumps([name for _, _, name in members], ensure_ascii=False)
