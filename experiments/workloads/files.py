"""The user's own memories and questions, from txt, md and jsonl files."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import field
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass

from experiments.text_files import read_text_file
from experiments.workloads.base import Cell, Workload
from experiments.workloads.cut import as_query, memory_tokens
from kvmem.errors import ConfigError
from kvmem.prompt import PromptTemplate

TEXT_SUFFIXES = (".txt", ".md")
LABEL_CHARS = 24

log = logging.getLogger("experiments")


class Record(NamedTuple):
    """A memory or a question, with a label for the tables. `truth` is the answer to a question if the file has it."""

    label: str
    text: str
    truth: str | None = None


def read_text(path: Path, knob: str) -> str:
    """The text of a file. Raises ConfigError if the file does not exist, is empty, or is not UTF-8 text."""
    if path.suffix not in (*TEXT_SUFFIXES, ".jsonl"):
        raise ConfigError(
            f"workload.{knob}: {path} has an unknown suffix. Choices: {', '.join(TEXT_SUFFIXES)}, .jsonl."
        )
    text = read_text_file(path, f"workload.{knob}")
    if not text.strip():
        raise ConfigError(f"workload.{knob}: {path} is empty. Write some text into it, or remove it from the list.")
    return text


def read_jsonl(path: Path, key: Literal["memory", "question"], knob: str) -> Iterator[Record]:
    """The records of a jsonl file. Raises ConfigError, with file and line, if a line is not a valid record."""
    for number, line in enumerate(read_text(path, knob).split("\n"), start=1):
        if not line.strip():
            continue
        wanted = f'Write {{"{key}": "…"' + (', "truth": "…"}.' if key == "question" else "}.")
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"workload.{knob}: {path}, line {number} is not JSON ({error}). {wanted}") from error
        if not isinstance(record, dict) or not isinstance(record.get(key), str) or not record[key].strip():
            raise ConfigError(f"workload.{knob}: {path}, line {number} has no text under {key!r}. {wanted}")
        truth = record.get("truth")
        yield Record(f"{_stem(path)}:{number}", record[key], None if truth is None else str(truth))


def read_memories(paths: Sequence[str]) -> list[Record]:
    """Reads memories: a txt or md file is one memory, a jsonl file has one a line."""
    records: list[Record] = []
    for path in map(Path, paths):
        if path.suffix == ".jsonl":
            records += read_jsonl(path, "memory", "memory")
        else:
            records.append(Record(_stem(path), read_text(path, "memory").strip()))
    return records


def read_questions(paths: Sequence[str]) -> list[Record]:
    """Reads questions, one a line."""
    records: list[Record] = []
    for path in map(Path, paths):
        if path.suffix == ".jsonl":
            records += read_jsonl(path, "question", "questions")
        else:
            lines = enumerate(read_text(path, "questions").split("\n"), start=1)
            records += [Record(f"{_stem(path)}:{number}", line.strip()) for number, line in lines if line.strip()]
    return records


def _stem(path: Path) -> str:
    return path.stem[:LABEL_CHARS]


@dataclass(config=ConfigDict(extra="forbid"))
class Files(Workload):
    """Your own texts, which are not cut. Each memory, or each group of memories, is combined with each question.

    memory: paths of txt and md files (one memory each) and of jsonl files ({"memory": …} on each line).
    questions: paths of txt and md files (a question on each line) and of jsonl files ({"question": …, "truth": …} on
        each line).
    memories: the number of memories in a group, which are merged. The last group may be smaller.
    max_cells: use only the first cells; null uses all.
    """

    memory: Annotated[list[str], Field(min_length=1)] = field(default_factory=lambda: ["examples/files/memory.md"])
    questions: Annotated[list[str], Field(min_length=1)] = field(
        default_factory=lambda: ["examples/files/questions.txt"]
    )
    memories: PositiveInt = 1
    max_cells: PositiveInt | None = None

    def check(self) -> None:
        read_memories(self.memory)
        read_questions(self.questions)

    def cells(self, template: PromptTemplate, separator: str) -> Sequence[Cell]:
        memories, questions = read_memories(self.memory), read_questions(self.questions)
        _tell_equal_texts(memories)
        groups = [memories[i : i + self.memories] for i in range(0, len(memories), self.memories)]
        return list(islice(_cells(groups, questions, template, separator), self.max_cells))


def _tell_equal_texts(memories: Sequence[Record]) -> None:
    """Logs which memories have the text of an earlier one. They share its KV cache."""
    first: dict[str, str] = {}
    for memory in memories:
        label = first.setdefault(memory.text, memory.label)
        if label != memory.label:
            log.warning("workload.memory: %s has the same text as %s. They are one memory.", memory.label, label)


def _cells(
    groups: Sequence[Sequence[Record]], questions: Sequence[Record], template: PromptTemplate, separator: str
) -> Iterator[Cell]:
    for group in groups:
        texts = tuple(record.text for record in group)
        tokens = memory_tokens(template, texts, separator)
        for question in questions:
            text = as_query(template, question.text)
            prompt = template.split(tokens, text)
            yield Cell(
                context="+".join(record.label for record in group),
                context_tokens=len(prompt.memory_ids),
                query=question.label,
                query_tokens=len(prompt.query_ids),
                memories=texts,
                question=text,
                truth=question.truth,
            )
