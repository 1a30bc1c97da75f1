"""The scheduler's state on a full disk and with damage: answers go on, and only what is damaged is lost."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvmem import MemScheduler
from kvmem.engines.huggingface import HFBackend
from kvmem.errors import DamagedFileError, KVMemWarning, StorageError
from kvmem.scheduler import policies
from kvmem.scheduler.journal import Journal
from tests.helpers.tiny import memory_on
from tests.scheduler.test_scheduler import MEMORIES, QUERY, ROOT, as_text, scheduler_on, use


@contextmanager
def full_disk(file_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes: the write that reaches them is short, the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def uses(scheduler: MemScheduler) -> dict[str, float]:
    table = scheduler.planner.table
    return {memory_id: table.uses[row] for memory_id, row in table.row_of.items()}


def whole_lines(folder: Path) -> list[Any]:
    content = (folder / "events.jsonl").read_bytes()
    assert not content or content.endswith(b"\n")
    return [json.loads(line) for line in content.splitlines()]


def written_state(backend: HFBackend, folder: Path, **fields: Any) -> None:
    """A state with counts of m0 and m1, a group of both, a failure and KV of m0; and a journal of one more use."""
    scheduler = scheduler_on(backend, folder, **fields)
    use(scheduler, MEMORIES[0], 5)
    for _ in range(3):
        scheduler.observe(MEMORIES[:2], QUERY)
    use(scheduler, MEMORIES[1], 2)
    scheduler.tick()
    with scheduler.observations.counts:
        scheduler.failures.add("m1", StorageError("once"), 1)
    scheduler.observations.snapshot(every=0)
    use(scheduler, MEMORIES[0], 1)
    scheduler.items.close()
    assert scheduler.journal is not None
    scheduler.journal.close()  # as a process that was killed


COUNTED = {"m0": 9.0, "m1": 2.0, '["m0", "m1"]': 1.0}


@contextmanager
def reopened(backend: HFBackend, folder: Path) -> Iterator[MemScheduler]:
    scheduler = scheduler_on(backend, folder)
    answer = scheduler.answer(QUERY, [MEMORIES[0]], 8)
    assert answer.token_ids == as_text(backend, MEMORIES[0])
    use(scheduler, MEMORIES[2], 6)
    for _ in range(4):
        scheduler.tick()
    assert "m2" in scheduler.index.tiers()
    scheduler.explain("m2")
    yield scheduler
    scheduler.close()
    with warnings.catch_warnings():  # once told is enough
        warnings.simplefilter("error", KVMemWarning)
        scheduler_on(backend, folder).close()


def test_a_full_disk_costs_no_answer_and_no_count(qwen3: HFBackend, tmp_path: Path) -> None:
    scheduler = scheduler_on(qwen3, tmp_path)
    right = as_text(qwen3, MEMORIES[0], 2)
    with full_disk(1000), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(40):
            assert scheduler.answer(QUERY, [MEMORIES[0]], 2).token_ids == right
        with pytest.raises(StorageError, match=r"state\.json can't be written"):
            scheduler.tick()
        written = whole_lines(tmp_path)
    assert scheduler.journal is not None and scheduler.journal.missed + len(written) == 41 and written
    assert [str(each.message) for each in told if each.category is KVMemWarning] == [
        f"{tmp_path / 'events.jsonl'} can't be written ([Errno 27] File too large). Answers go on; the counts are kept "
        "in memory and are written at the first tick that can. Free some space."
    ]
    scheduler.tick()  # there is space again
    assert scheduler.journal.missed == 0
    scheduler.items.close()
    scheduler.journal.close()  # as a process that was killed
    again = scheduler_on(qwen3, tmp_path)
    assert uses(again) == {"m0": 40}
    again.close()


def test_a_process_killed_on_a_full_disk_leaves_whole_lines(qwen3: HFBackend, tmp_path: Path) -> None:
    for limit in (1990, 2000, 2037):
        folder = tmp_path / str(limit)
        scheduler = scheduler_on(qwen3, folder)
        with full_disk(limit), pytest.warns(KVMemWarning, match="can't be written"):
            for _ in range(40):
                scheduler.observe(MEMORIES[0], QUERY)
        scheduler.observe(MEMORIES[1], QUERY)  # space again
        scheduler.items.close()
        assert scheduler.journal is not None
        scheduler.journal.close()
        written = whole_lines(folder)
        with scheduler_on(qwen3, folder) as again:
            assert uses(again) == {"m0": len(written) - 3, "m1": 1}


def test_a_state_that_can_not_be_written_opens_all_the_same(qwen3: HFBackend, tmp_path: Path) -> None:
    written_state(qwen3, tmp_path, ram=0)
    with full_disk(1000), pytest.warns(KVMemWarning, match="The next tick tries again"):
        scheduler = scheduler_on(qwen3, tmp_path)
        assert scheduler.answer(QUERY, [MEMORIES[0]], 2).cached_tokens > 50
    assert uses(scheduler) == COUNTED
    scheduler.close()


def test_the_thread_goes_on_when_the_disk_is_full(qwen3: HFBackend, tmp_path: Path) -> None:
    scheduler = scheduler_on(qwen3, tmp_path)
    with full_disk(1000), warnings.catch_warnings():
        warnings.simplefilter("ignore", KVMemWarning)
        scheduler.start(0.01)
        use(scheduler, MEMORIES[0], 20)
        while not scheduler.failed_ticks or "m0" not in scheduler.index.tiers():
            pass
        assert scheduler.is_ticking
    scheduler.close()
    with scheduler_on(qwen3, tmp_path) as again:
        assert uses(again) == {"m0": 20}


def edit(change: Callable[[Any], Any]) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps(change(json.loads(content))).encode()


def without(*path: Any) -> Callable[[bytes], bytes]:
    def change(document: Any) -> Any:
        inner = document
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        return document

    return edit(change)


def replaced(value: Any, *path: Any) -> Callable[[bytes], bytes]:
    def change(document: Any) -> Any:
        inner = document
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return document

    return edit(change)


STATES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut off": lambda content: content[: len(content) // 2],
    "a list": lambda content: b"[]",
    "null": lambda content: b"null",
    "a number": lambda content: b"3",
    "an empty object": lambda content: b"{}",
    "binary": lambda content: bytes(range(256)) * 4,
    "latin-1": lambda content: content.replace(b'"version"', b'"\xe9", "version"'),
    "deep": lambda content: b"[" * 100_000,
    "a version that is a text": replaced("1", "version"),
    "no number": without("number"),
    "a number that is a text": replaced("1", "number"),
    "no state": without("state"),
    "a state that is a list": replaced([], "state"),
}
PARTS: dict[str, Callable[[bytes], bytes]] = {
    **{f"no {part}": without("state", part) for part in ("planner", "texts", "failures")},
    **{
        f"{part} is {json.dumps(value)}": replaced(value, "state", part)
        for part in ("planner", "texts", "failures", "groups")
        for value in (None, [3], {"a": 3}, "x")
    },
    "no table": without("state", "planner", "table"),
    "an id twice": replaced(["m0", "m0", "m1"], "state", "planner", "table", "ids"),
    "ids that are numbers": replaced([1, 2, 3], "state", "planner", "table", "ids"),
    "a short column": replaced([1.0], "state", "planner", "table", "columns", "uses"),
    "no column": without("state", "planner", "table", "columns", "edits"),
    "NaN": replaced([float("nan")] * 3, "state", "planner", "table", "columns", "uses"),
    "totals": replaced([1.0], "state", "planner", "table", "totals"),
    "a negative time": replaced(-1, "state", "planner", "table", "now"),
    "query_tokens": replaced("many", "state", "planner", "query_tokens"),
    "what the policy learned": replaced({"success": [1.0], "recent": []}, "state", "planner", "learned"),
    "one text": replaced({"id": 3}, "state", "texts", 0),
    "a text that is no Unicode": replaced("\ud800", "state", "texts", 0, "memory"),
    "a failure": replaced({"m1": {"count": 1}}, "state", "failures"),
    "a group of one": replaced({"members": [["m0"]], "seen": []}, "state", "groups"),
    "seen": replaced({"members": [["m0", "m1"]], "seen": [3]}, "state", "groups"),
}


@pytest.mark.parametrize("name", [*STATES, *PARTS])
def test_a_damaged_state_is_set_aside_and_the_rest_is_used(qwen3: HFBackend, tmp_path: Path, name: str) -> None:
    written_state(qwen3, tmp_path)
    path = tmp_path / "state.json"
    damaged = (STATES | PARTS)[name](path.read_bytes())
    path.write_bytes(damaged)
    match = r"state\.json is damaged: .*state\.json\.damaged, and the rest is used"
    with pytest.warns(KVMemWarning, match=match) as told, reopened(qwen3, tmp_path) as scheduler:
        assert uses(scheduler)["m0"] >= 2, "the journal's use, and this"
        if name in PARTS and not name.startswith(("no texts", "texts", "one text", "a text that")):
            assert scheduler.index.texts["m1"] == MEMORIES[1]
        if name in PARTS and name.startswith(("no failures", "failures", "a failure", "one text")):
            assert uses(scheduler).items() >= {"m0": 10, "m1": 2}.items()
    assert len(told) == 1 and (tmp_path / "state.json.damaged").read_bytes() == damaged


LINES: dict[str, bytes] = {
    "no JSON": b"[0, {",
    "two lines joined": b'[1, {"kind": "use", "id": "m0", "query[1, {"kind": "use", "id": "m1"}]',
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "one entry": b"[1]",
    "no event": b"[1, null]",
    "no number": b'["1", {"kind": "use", "id": "m1", "query_tokens": 3, "memory": null}]',
    "an empty event": b"[1, {}]",
    "no id": b'[1, {"kind": "use", "query_tokens": 3, "memory": null}]',
    "another kind": b'[1, {"kind": "ufe", "id": "m1", "query_tokens": 3, "memory": null}]',
    "a negative length": b'[1, {"kind": "use", "id": "m1", "query_tokens": -3, "memory": null}]',
    "a text without a text": b'[1, {"kind": "text", "id": "m1", "query_tokens": 0, "memory": null}]',
    "a text that is no Unicode": b'[1, {"kind": "text", "id": "m9", "memory": {"id": "m9", "memory": "\\ud800"}}]',
    "a text with NaN": b'[1, {"kind": "text", "id": "m9", "memory": {"memory": "a", "metadata": {"a": NaN}}}]',
    "latin-1": b'[1, {"kind": "\xe9"}]',
    "UTF-16": "[1, {}, é".encode("utf-16"),
    "binary": bytes(each for each in range(256) if each != 10),
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("name", LINES)
def test_a_damaged_line_is_set_aside_and_the_others_are_counted(qwen3: HFBackend, tmp_path: Path, name: str) -> None:
    written_state(qwen3, tmp_path)
    path = tmp_path / "events.jsonl"
    number = json.loads((tmp_path / "state.json").read_bytes())["number"]
    line = LINES[name].replace(b"[1, ", b"[%d, " % number)
    path.write_bytes(line + b"\n" + path.read_bytes() * 2)
    match = r"events\.jsonl is damaged: .*events\.jsonl\.damaged, and the rest"
    with pytest.warns(KVMemWarning, match=match) as told, reopened(qwen3, tmp_path) as scheduler:
        assert uses(scheduler).items() >= {"m0": 11, "m1": 2, '["m0", "m1"]': 1}.items()
    aside = (tmp_path / "events.jsonl.damaged").read_bytes()
    assert len(told) == 1 and (aside == line + b"\n" or json.loads(aside) == json.loads(line)[1])


@pytest.mark.parametrize("name", sorted(policies.POLICIES.classes().keys() - {"oracle"}))  # it has no state
def test_a_damaged_part_of_any_policy(qwen3: HFBackend, tmp_path: Path, name: str) -> None:
    for learned in ([], {}, {"counts": 3, "seen": None}, {"success": "x", "recent": None}):
        policy = policies.policy(name)
        before = policy.state()
        if not before:
            policy.restore({})
            continue
        with pytest.raises((KeyError, TypeError, ValueError)):
            policy.restore(learned)  # type: ignore[arg-type]
        assert policy.state() == before


def test_a_state_of_a_later_version_is_refused_and_left_as_it_is(qwen3: HFBackend, tmp_path: Path) -> None:
    written_state(qwen3, tmp_path)
    path = tmp_path / "state.json"
    later = replaced(99, "version")(path.read_bytes())
    path.write_bytes(later)
    for _ in range(2):  # the first one leaves the folder to the second
        with pytest.raises(DamagedFileError, match="version 99"):
            scheduler_on(qwen3, tmp_path)
    assert path.read_bytes() == later


def test_names_of_what_is_set_aside_do_not_collide(tmp_path: Path) -> None:
    for damaged in (b"[]", b"null"):
        (tmp_path / "state.json").write_bytes(damaged)
        journal = Journal(tmp_path)
        with pytest.warns(KVMemWarning):
            assert journal.read() == (None, [])
        journal.close()
    assert (tmp_path / "state.json.damaged").read_bytes() == b"[]"
    assert (tmp_path / "state.json.damaged-2").read_bytes() == b"null"


ONE_FOLDER = """
import sys
from pathlib import Path
from kvmem.errors import StorageError
from tests.helpers.tiny import tiny_backend
from tests.scheduler.test_scheduler import scheduler_on
try:
    scheduler_on(tiny_backend("qwen3"), Path(sys.argv[1]))
except StorageError as error:
    print(error)
"""


def test_a_second_process_is_refused_and_changes_nothing(qwen3: HFBackend, tmp_path: Path) -> None:
    scheduler = scheduler_on(qwen3, tmp_path)
    use(scheduler, MEMORIES[0], 3)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    second = subprocess.run(
        [sys.executable, "-c", ONE_FOLDER, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert second.stdout == f"{tmp_path} is another process's. Give this scheduler a folder of its own.\n"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    scheduler.close()
    assert memory_on(qwen3).get_all() == []
