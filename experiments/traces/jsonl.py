"""A user's own trace, one event a line of JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from experiments.traces.base import Event, Trace
from kvmem.errors import ConfigError, PromptError
from kvmem.prompt import PromptTemplate

QUERY_TOKENS = 40
"""Of a use whose line does not say."""


@dataclass(config=ConfigDict(extra="forbid"))
class _Line:
    memory: str
    """Any name; the same name is the same memory."""
    kind: Literal["use", "edit"] = "use"
    tokens: Annotated[int, Field(gt=0)] | None = None
    text: str | None = None
    """Instead of `tokens`: the text, which is counted."""
    query_tokens: Annotated[int, Field(gt=0)] | None = None


_LINE = TypeAdapter(_Line)


def read(path: Path, template: PromptTemplate) -> Trace:
    """The trace in `path`: {"memory": "faq", "tokens": 412}, {"memory": "faq", "kind": "edit"}, … in order of time.

    A memory's first line that has `tokens` or `text` gives its length, for all of the trace; queries count with their
    mean. Raises ConfigError, with the line's number, for a line that is none, and for a memory of no known length.
    """
    if not path.is_file():
        raise ConfigError(f"scenario.trace_file={path}: there is no such file. Give a file with one event a line.")
    number_of: dict[str, int] = {}
    tokens: dict[str, int] = {}
    events: list[Event] = []
    query_tokens: list[int] = []
    for at, raw in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not raw.strip():
            continue
        try:
            line = _LINE.validate_python(json.loads(raw))
            if line.memory not in tokens and (line.tokens or line.text):
                tokens[line.memory] = line.tokens or len(template.memory_tokens(line.text or "").token_ids)
        except (json.JSONDecodeError, ValidationError, PromptError) as error:
            raise ConfigError(
                f"{path}, line {at}: {str(error).splitlines()[0]}. See experiments/traces/jsonl.py."
            ) from error
        events.append(Event(line.kind, number_of.setdefault(line.memory, len(number_of))))
        if line.kind == "use":
            query_tokens.append(line.query_tokens or QUERY_TOKENS)
    unknown = [memory for memory in number_of if memory not in tokens]
    if unknown or not query_tokens:
        what = f"no line of {unknown[0]!r} has tokens or text" if unknown else "there is no use in it"
        raise ConfigError(f"{path}: {what}. Give each memory a length, and a use at least.")
    lengths = tuple(tokens[memory] for memory in number_of)
    return Trace(path.stem, 0, lengths, round(float(np.mean(query_tokens))), tuple(events))
