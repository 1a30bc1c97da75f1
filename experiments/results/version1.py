"""Reads rows of version 1, in which a row held the figures of every scenario and an untyped `extra`."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

LABELS = {"context": "context_label", "query": "query_label"}
DUPLICATES = {"context_tokens", "query_tokens", "equality", "equal", "interval"}
"""Keys of `extra` that repeat a field of the row, or that are text made from another figure."""


def upgraded(fields: Mapping[str, Any], row_fields: Set[str]) -> dict[str, Any]:
    """The fields of a version 1 row as those of the present version.

    What is not a field of a row any more, and all of `extra`, becomes the payload. Figures that were not measured are
    left out. A failed row has no payload.
    """
    extra = dict(fields.get("extra", {}))
    kept = {name: value for name, value in fields.items() if name in row_fields}
    kept |= {new: extra.pop(old) for old, new in LABELS.items() if extra.get(old)}
    moved = {name: value for name, value in fields.items() if name not in row_fields and name != "extra"}
    figures = moved | {name: value for name, value in extra.items() if name not in DUPLICATES}
    measured = {name: value for name, value in figures.items() if value is not None and name not in LABELS}
    return kept | {"payload": measured if kept.get("status") != "failed" else None}
