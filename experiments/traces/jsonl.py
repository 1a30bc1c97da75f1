"""A user's own trace, one event a line of JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from experiments.text_files import read_text_file
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


def lines(path: Path) -> list[tuple[int, _Line]]:
    """The lines of the trace in `path`, with their numbers; blank lines are left out.

    Raises ConfigError if the file can't be read, or a line is not an event.
    """
    read = []
    for at, raw in enumerate(read_text_file(path, "scenario.trace_file").split("\n"), 1):
        if raw.strip():
            try:
                read.append((at, _LINE.validate_python(json.loads(raw))))
            except (json.JSONDecodeError, ValidationError) as error:
                raise _wrong_line(path, at, error) from error
    return read


def _wrong_line(path: Path, at: int, error: ValueError) -> ConfigError:
    return ConfigError(f"{path}, line {at}: {str(error).splitlines()[0]}. See experiments/traces/jsonl.py.")


def read(path: Path, template: PromptTemplate) -> Trace:
    """The trace in `path`: {"memory": "faq", "tokens": 412}, {"memory": "faq", "kind": "edit"}, … in order of time.

    A memory's first line that has `tokens` or `text` gives its length, for all of the trace; queries count with their
    mean. Raises ConfigError, with the line's number, for a line that is none, and for a memory of no known length.
    """
    number_of: dict[str, int] = {}
    tokens: dict[str, int] = {}
    events: list[Event] = []
    query_tokens: list[int] = []
    for at, line in lines(path):
        try:
            if line.memory not in tokens and (line.tokens or line.text):
                tokens[line.memory] = line.tokens or len(template.memory_tokens(line.text or "").token_ids)
        except PromptError as error:
            raise _wrong_line(path, at, error) from error
        events.append(Event(line.kind, number_of.setdefault(line.memory, len(number_of))))
        if line.kind == "use":
            query_tokens.append(line.query_tokens or QUERY_TOKENS)
    unknown = [memory for memory in number_of if memory not in tokens]
    if unknown or not query_tokens:
        what = f"no line of {unknown[0]!r} has tokens or text" if unknown else "there is no use in it"
        raise ConfigError(f"{path}: {what}. Give each memory a length, and a use at least.")
    lengths = tuple(tokens[memory] for memory in number_of)
    return Trace(path.stem, 0, lengths, round(float(np.mean(query_tokens))), tuple(events))
