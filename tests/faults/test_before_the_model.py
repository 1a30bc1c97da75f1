"""What can be known to be wrong before a model loads is one line before it loads; equal texts are one memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.config.compose import compose, validate
from experiments.execution import UNDECIDED
from experiments.results import read_rows
from experiments.traces import jsonl
from experiments.workloads import docs_texts
from experiments.workloads.files import Files, read_memories, read_questions
from kvmem.errors import ConfigError
from kvmem.prompt import PromptTemplate
from tests.faults.commands import ENV, run
from tests.helpers import mounts

EXAMPLES = Path(__file__).parents[2] / "examples/files"
QUESTIONS = f"workload.questions=[{EXAMPLES / 'questions.txt'}]"
WRONG = {
    "a missing memory": (("workload=files", "workload.memory=[gone.md]"), "workload.memory: there is no file gone.md"),
    "a missing question": (("workload=files", "workload.questions=[gone.txt]"), "there is no file "),
    "a missing trace": (("scenario=reuse_trace", "scenario.trace_file=gone.jsonl"), "scenario.trace_file: there is no"),
    "another engine": (
        ("scenario=under_load",),
        "scenario=under_load can't measure backend=huggingface. Use backend=vl",
    ),
    "an arm that is none": (
        ("scenario=under_load", "backend=vllm", "scenario.arms=[texts]"),
        "Unknown arm of a load 'texts'. Did you mean text?",
    ),
    "no rate": (("scenario=under_load", "backend=vllm", "scenario.search=false"), "There is no rate to measure."),
    "a small window": (
        ("scenario=under_load", "backend=vllm", "backend.max_model_len=300"),
        "backend.max_model_len=300 does not hold a prompt of about 356 tokens",
    ),
    "too little text": (
        ("scenario=under_load", "backend=vllm", "scenario.memories=25", "scenario.memory_tokens=40000"),
        "of 25 memories only 24 have so much text",
    ),
    "missing arrivals": (
        ("scenario=under_load", "backend=vllm", "scenario.trace_file=gone.jsonl"),
        "scenario.trace_file: there is no file gone.jsonl",
    ),
    "no prefix cache": (("scenario=prefix_reuse",), "needs an engine with a prefix cache of its own"),
    "a misspelled device": (("backend.device=cudda",), "backend: Unknown device 'cudda'. Did you mean cuda?"),
    "a misspelled attention": (
        ("backend.attn_implementation=spda",),
        "Unknown attn_implementation 'spda'. Did you mean",
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_found_before_a_model_loads(mistake: str) -> None:
    overrides, message = WRONG[mistake]
    with pytest.raises(ConfigError) as raised:
        config = validate(compose(["model=tiny", *overrides]))
        config.scenario.check(config)
    assert message in str(raised.value) and len(str(raised.value).splitlines()) == 1


def test_the_last_job_of_a_sweep_is_checked_before_the_first_one_starts(tmp_path: Path) -> None:
    files = ("workload=files", f"workload.memory=[{EXAMPLES / 'memory.md'}],[gone.md]", QUESTIONS)
    status, output = run(tmp_path, "-m", "model=tiny", "sink=none", *files)
    assert status == 2
    (line,) = output.splitlines()
    assert line.startswith("error: workload.memory: there is no file gone.md") and "in the job" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "env", "message"),
    [
        (["backend.device=cuda:9"], {"CUDA_VISIBLE_DEVICES": ""}, "device=cuda:9: this machine has no GPU"),
        (["backend.attn_implementation=flash_attention_2"], {"CUDA_VISIBLE_DEVICES": ""}, "flash_attention_2"),
        ([], {"KVMEM_CACHE": "taken"}, "taken, can't be written"),
    ],
    ids=["a GPU that is not here", "a kernel that is not installed", "a cache folder that is a file"],
)
def test_what_this_machine_lacks_is_one_line(
    overrides: list[str], env: dict[str, str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file")
    status, output = run(tmp_path, "model=tiny", "sink=none", "hydra.run.dir=run", *overrides, **env)
    assert status in (1, 2)
    loading, line = output.splitlines()
    assert loading.startswith("loading ") and line.startswith("error: ") and message in line


@pytest.mark.skipif(bool(mounts.why_not()), reason=f"no disk of its own for a test: {mounts.why_not()}")
def test_a_read_only_cache_folder_is_one_line_before_anything_is_converted(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    code = "from kvmem.models import loading; loading.packaged_folder()"
    done = subprocess.run(
        mounts.with_disk(cache, "ro", [sys.executable, "-c", code]),
        env=os.environ | ENV | {"KVMEM_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("kvmem.errors.ModelError: ") and "Read-only file system" in last and "KVMEM_CACHE" in last


def test_more_memories_than_topics_all_differ_from_their_first_words_on() -> None:
    for texts in (
        [docs_texts(0, context, 1).memories[0] for context in range(100)],
        [text for context in range(3) for text in docs_texts(0, context, 30).memories],
    ):
        assert len({text[:60] for text in texts}) == len(texts)
    assert not docs_texts(0, 0, 1).memories[0].startswith("Edition")


def test_equal_lines_of_a_file_are_one_memory_which_is_said(tmp_path: Path) -> None:
    lines = [{"memory": f"Drawer {number} holds {number + 3} spoons and nothing else."} for number in (1, 2, 1)]
    (tmp_path / "notes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "ask.txt").write_text("How many spoons are in drawer 1?\n")
    knobs = ("workload=files", "workload.memory=[notes.jsonl]", "workload.questions=[ask.txt]", "workload.memories=3")
    model = ("model=tiny", "sink=none", "scenario.pairs=1", "scenario.answer_tokens=2", "hydra.run.dir=run")
    status, output = run(tmp_path, *model, *knobs)
    assert status in (0, UNDECIDED), output
    assert output.count("notes:3 has the same text as notes:1. They are one memory.") == 1
    (row,) = read_rows(tmp_path / "run")
    assert (row.status, row.memories) == ("done", 3)
    assert row.equality in ("bitwise", "tokens") and row.verdict in ("ok", "undecided")


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    memory, records, asked = tmp_path / "a.md", tmp_path / "b.jsonl", tmp_path / "c.txt"
    memory.write_text("A memory.", encoding="utf-8-sig")
    records.write_text('{"memory": "Another memory."}\n', encoding="utf-8-sig")
    asked.write_text("Why?\nWhere?\n", encoding="utf-8-sig")
    assert [record.text for record in read_memories([str(memory), str(records)])] == ["A memory.", "Another memory."]
    assert [record.text for record in read_questions([str(asked)])] == ["Why?", "Where?"]


def test_a_trace_file_may_have_a_byte_order_mark_and_any_line_separator_in_a_text(
    tmp_path: Path, template: PromptTemplate
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"memory": "faq", "text": "One\u2028two three."}\n{"memory": "faq"}\n', encoding="utf-8-sig")
    assert len(jsonl.read(path, template).events) == 2


@pytest.fixture
def template(qwen3) -> PromptTemplate:
    return qwen3.template


def test_whatever_is_no_file_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "folder.md").mkdir()
    os.mkfifo(tmp_path / "pipe.md")
    (tmp_path / "circle.md").symlink_to(tmp_path / "circle.md")
    (tmp_path / "utf16.md").write_text("A memory.", encoding="utf-16")
    wrong = {
        "folder.md": "is a folder, a pipe or a device",
        "pipe.md": "is a folder, a pipe or a device",
        "circle.md": "can't be read",
        "utf16.md": "is not UTF-8 text",
        "a" * 300 + ".md": "can't be read",
        "null\0.md": "can't be read",
    }
    for name, message in wrong.items():
        with pytest.raises(ConfigError, match=message):
            Files(memory=[str(tmp_path / name)], questions=[str(EXAMPLES / "questions.txt")]).check()
        with pytest.raises(ConfigError, match=message):
            jsonl.lines(tmp_path / name)


def test_a_file_and_a_run_folder_may_have_a_name_of_240_characters(tmp_path: Path) -> None:
    name = "n" * 240
    (tmp_path / f"{name}.md").write_text("Drawer 1 holds 4 spoons and nothing else.")
    knobs = ("workload=files", f"workload.memory=[{name}.md]", QUESTIONS, "workload.max_cells=1")
    folder = f"hydra.run.dir={name}"
    status, output = run(tmp_path, "model=tiny", "sink=wandb", "scenario.pairs=1", *knobs, folder, WANDB_MODE="offline")
    assert status in (0, UNDECIDED), output
    assert len(read_rows(tmp_path / name)) == 1
