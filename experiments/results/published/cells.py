"""The published TTFT tables, one CSV each: a table that is laid beside these is found by itself.

A CSV names its columns as `PublishedRow` does; a time may be given in ms (`kv_ttft_ms`), and what the published vLLM
table calls its columns is understood too.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from experiments.results import formatting
from kvmem.errors import ConfigError

NOT_STATED = "not stated"

_ALSO_CALLED = {
    "memory_tokens": "context_tokens",
    "prompt_tokens": "query_tokens",
    "ttft_with_cache_s": "kv_ttft_s",
    "ttft_without_cache_s": "direct_ttft_s",
}


@dataclass(frozen=True)
class PublishedRow:
    """One published cell, as published: nothing of it was measured here. Times in seconds, lengths in tokens."""

    table: str
    model: str
    context: str
    query: str
    context_tokens: float
    query_tokens: float
    kv_ttft_s: float
    direct_ttft_s: float
    speedup_pct: float
    build_s: float | None = None
    hardware: str = NOT_STATED


def _read(path: Path) -> Iterator[PublishedRow]:
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            fields: dict[str, Any] = {}
            for column, text in line.items():
                scale = 1e-3 if column.endswith("_ms") else 1.0
                key = column.removesuffix("_ms") + "_s" if column.endswith("_ms") else column
                key = _ALSO_CALLED.get(key, key)
                fields[key] = float(text) * scale if key.endswith(("_s", "_tokens", "_pct")) else text
            fields.pop("saved_s", None)  # follows from the other two
            for label in ("context", "query"):
                if f"{label}_tokens" in fields:
                    fields.setdefault(label, formatting.count(float(fields[f"{label}_tokens"])))
            try:
                yield PublishedRow(table=path.stem, **fields)
            except TypeError as error:
                raise ConfigError(f"{path.name} is no table of published cells: {error}") from error


@cache
def tables(folder: Path = Path(__file__).parent) -> tuple[PublishedRow, ...]:
    """Every cell of every CSV in `folder`; ConfigError for a CSV with columns that no cell has."""
    return tuple(row for path in sorted(folder.glob("*.csv")) for row in _read(path))


def beside(model: str, context: str, query: str) -> tuple[PublishedRow, ...]:
    """The published cells of this model with these labels."""
    return tuple(row for row in tables() if (row.model, row.context, row.query) == (model, context, query))
