"""MemScheduler called with wrong kinds, values or ids: an error of kvmem, and what was observed stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvmem import TextualMemoryItem
from kvmem.errors import ArgumentError, ClosedError, ConfigError, PromptError, StorageError, UnknownMemoryError
from kvmem.scheduler.cost_model import Costs
from kvmem.scheduler.scheduler import MemScheduler
from tests.helpers.tiny import kind, memory_on
from tests.scheduler.test_scheduler import MEMORIES, QUERY, as_text, scheduler_on

FIRST = MEMORIES[0]
NO_MEMORIES: list[Any] = [3, "m0", ["m0"], [FIRST, "m1"], {"id": "m0"}, {"m0": FIRST}, [None], object()]
NO_QUERIES: list[Any] = [None, 3, b"x", "", [], ["x"], [{"role": "user"}], [{"role": "user", "content": 3}]]


@pytest.fixture
def observed(qwen3, tmp_path):
    """A scheduler that has seen one memory once. A wrong call must not change it."""
    scheduler = scheduler_on(qwen3, tmp_path)
    scheduler.observe(FIRST, QUERY)
    scheduler.tick()
    before = scheduler.explain("m0"), scheduler.planner.state()
    yield scheduler
    scheduler.tick()  # a refused call leaves nothing behind that makes this fail
    assert (scheduler.explain("m0"), scheduler.planner.state()) == before
    assert list(scheduler.index.texts.values()) == [FIRST] and not scheduler.failures
    scheduler.close()


@pytest.mark.parametrize("given", NO_MEMORIES, ids=kind)
def test_anything_but_a_text_memory(observed, given):
    calls = (
        lambda: observed.observe(given, QUERY),
        lambda: observed.update(given),
        lambda: observed.answer(QUERY, given, 2),
        lambda: observed.view(given).__enter__(),
    )
    for call in calls:
        with pytest.raises(ArgumentError, match=r"has to be TextualMemoryItem, not .* Give TextualMemoryItem"):
            call()


@pytest.mark.parametrize("query", NO_QUERIES, ids=kind)
def test_anything_but_a_query(observed, query):
    with pytest.raises(PromptError, match=r"A query is|The query is empty|A turn is"):
        observed.observe(MEMORIES[1], query)
    with pytest.raises(PromptError, match=r"A query is|The query is empty|A turn is"):
        observed.answer(query, [MEMORIES[1]], 2)


@pytest.mark.parametrize("tokens", [0, "3", None])
def test_an_answer_of_no_tokens(observed, tokens):
    with pytest.raises((ConfigError, ArgumentError), match="max_new_tokens"):
        observed.answer(QUERY, [MEMORIES[1]], tokens)


@pytest.mark.parametrize("id_", [None, 3, [], FIRST], ids=kind)
def test_explain_of_anything_but_an_id(observed, id_):
    with pytest.raises(ArgumentError, match="has to be str"):
        observed.explain(id_)
    with pytest.raises(UnknownMemoryError, match="Never observed: m9"):
        observed.explain("m9")


@pytest.mark.parametrize("interval_s", [0, -1.0, "1", None])
def test_start_with_no_interval(observed, interval_s):
    with pytest.raises((ConfigError, ArgumentError), match="interval_s"):
        observed.start(interval_s)


def test_start_twice_is_refused(observed):
    observed.start(60.0)
    with pytest.raises(ConfigError, match="ticks already"):
        observed.start(60.0)


@pytest.mark.parametrize("given", [FIRST, iter([FIRST]), (FIRST,)], ids=["alone", "iterator", "tuple"])
def test_one_memory_alone_and_an_iterator_are_taken(qwen3, given):
    """The check of an iterator must not exhaust it, which would record an empty use."""
    scheduler = scheduler_on(qwen3)
    assert scheduler.answer(QUERY, given, 8).token_ids == as_text(qwen3, FIRST)
    scheduler.tick()
    assert scheduler.planner.table.now == 1 and list(scheduler.index.texts) == ["m0"]


@pytest.mark.parametrize("folder", [True, False], ids=["folder", "no folder"])
def test_after_close(qwen3, tmp_path, folder):
    scheduler = scheduler_on(qwen3, tmp_path if folder else None)
    scheduler.observe(FIRST, QUERY)
    scheduler.close()
    edited = TextualMemoryItem(id="m0", memory=MEMORIES[1].memory)
    for call in (lambda: scheduler.observe(FIRST, QUERY), lambda: scheduler.update(edited), scheduler.start):
        with pytest.raises(ClosedError, match="This scheduler is closed"):
            call()
    assert scheduler.answer(QUERY, [FIRST], 8).token_ids == as_text(qwen3, FIRST)  # as text, and not counted
    assert scheduler.tick() == [] and scheduler.planner.table.now == 1


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"memory": None}, ArgumentError, "memory has to be KVCacheMemory, not None"),
    ({"policy": None}, ArgumentError, "policy has to be Policy or str, not None"),
    ({"policy": "nix"}, ConfigError, "Unknown policy 'nix'"),
    ({"budget": None}, ArgumentError, "budget has to be Mapping, not None. Give bytes by tier"),
    ({"budget": 1 << 30}, ArgumentError, "budget has to be Mapping, not int. Give bytes by tier"),
    ({"budget": {}}, ConfigError, "budget is {}"),
    ({"budget": {"ram": "1 GB"}}, ConfigError, "budget is {'ram': '1 GB'}. Give bytes"),
    ({"budget": {"ram": None}}, ConfigError, "budget is {'ram': None}. Give bytes"),
    ({"budget": {"rum": 1}}, ConfigError, "Did you mean ram"),
    ({"folder": 3}, ArgumentError, "folder has to be str or PathLike or None, not int"),
    ({"folder": __file__}, StorageError, "can't hold the state"),
    ({"costs": 3}, ArgumentError, "costs has to be Costs or None, not int"),
    ({"max_builds": "1"}, ArgumentError, "max_builds has to be int, not str"),
    ({"max_builds": -1}, ConfigError, "max_builds is -1"),
    ({"cold": 3}, ArgumentError, "cold has to be str or None, not int"),
]


@pytest.mark.parametrize(("wrong", "error", "match"), WRONG, ids=[str(wrong) for wrong, *_ in WRONG])
def test_a_scheduler_of_wrong_kinds(qwen3, wrong, error, match):
    arguments = {
        "memory": memory_on(qwen3),
        "policy": "lru",
        "budget": {"ram": 1 << 20},
        "costs": Costs(0.001, 1e-4, 0.0, 64),
    }
    with pytest.raises(error, match=match.replace("{", r"\{")):
        MemScheduler(**arguments | wrong)
    assert Path(__file__).is_file()
