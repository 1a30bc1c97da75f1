"""Streamed, asynchronous and batched answers are those of `answer`, and what they compute is kept in the same way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmem import TextualMemoryItem
from kvmem.engines.graph.backend import HFGraphBackend
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import ArgumentError, ChangedFileError, ConfigError, PromptError
from kvmem.models.loading import Loaded
from kvmem.scheduler.scheduler import MOST_WAITING, MemScheduler
from tests.scheduler.test_closing import sized
from tests.scheduler.test_scheduler import MEMORIES, QUERY, as_text, scheduler_on

QUERIES = [QUERY, "Name one exception.", "Why?"]


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    """Whether it holds before so many seconds have passed."""
    waiting = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if holds():
            return True
        waiting.wait(0.01)
    return holds()


@pytest.fixture(params=["qwen3", "graph"])
def engine(request: pytest.FixtureRequest, qwen3: HFBackend) -> HFBackend:
    if request.param == "graph":
        return HFGraphBackend(Loaded(qwen3.model, qwen3.tokenizer, qwen3.fingerprint.origin))
    return qwen3


def test_a_stream_is_the_answer_and_keeps_what_it_computes(engine: HFBackend) -> None:
    expected = scheduler_on(engine).answer(QUERY, MEMORIES[0], 8)
    scheduler = scheduler_on(engine)
    for hits in (0, 1):
        tokens = list(scheduler.stream(QUERY, MEMORIES[0], 8))
        assert tuple(token.id for token in tokens) == expected.token_ids
        assert "".join(token.text for token in tokens) == expected.text
        assert scheduler.stats().hits == hits and scheduler.stats().admissions == 1
    assert scheduler.planner.table.now == 1 and not scheduler.gate._running


def test_a_stream_that_is_closed_early_or_never_read(qwen3: HFBackend) -> None:
    scheduler = scheduler_on(qwen3)
    scheduler.stream(QUERY, MEMORIES[0], 8)
    assert scheduler.stats().misses == 0 and not scheduler._answers, "nothing runs before the first token is asked for"
    stream = scheduler.stream(QUERY, MEMORIES[0], 8)
    next(stream)
    assert scheduler.gate._running, "builds wait while it runs"
    stream.close()
    assert scheduler.stats().admissions == 1 and not scheduler.gate._running and not scheduler._answers
    assert scheduler.answer(QUERY, MEMORIES[0], 8).token_ids == as_text(qwen3, MEMORIES[0])


def test_a_text_that_is_forgotten_or_edited_during_a_stream_is_not_kept(qwen3: HFBackend) -> None:
    for act in (
        lambda scheduler: scheduler.forget("m0"),
        lambda scheduler: scheduler.update(TextualMemoryItem(id="m0", memory=MEMORIES[1].memory)),
    ):
        scheduler = scheduler_on(qwen3)
        scheduler.observe(MEMORIES[0], QUERY)
        stream = scheduler.stream(QUERY, MEMORIES[0], 8)
        first = next(stream)
        act(scheduler)
        assert (first.id, *(token.id for token in stream)) == as_text(qwen3, MEMORIES[0])
        assert MEMORIES[0].memory not in [metadata_source(scheduler, item) for item in scheduler.items.ids()]


def metadata_source(scheduler: MemScheduler, item_id: str) -> object:
    return scheduler.items.metadata(item_id).tokens.source


def test_a_file_that_changes_while_a_stream_loads_it(qwen3: HFBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_on(qwen3)
    scheduler.answer(QUERY, MEMORIES[0], 1)
    prefill = qwen3.prefill
    failed: list[str] = []

    def once(*args: object) -> object:
        if not failed:
            failed.append("changed")
            raise ChangedFileError("it changed")
        return prefill(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(qwen3, "prefill", once)
    assert tuple(token.id for token in scheduler.stream(QUERY, MEMORIES[0], 8)) == as_text(qwen3, MEMORIES[0])


def test_wrong_streams_are_refused_before_the_first_token(qwen3: HFBackend) -> None:
    scheduler = scheduler_on(qwen3)
    with pytest.raises(ArgumentError, match="has to be TextualMemoryItem"):
        scheduler.stream(QUERY, "m0")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="The query is empty"):
        scheduler.stream("", MEMORIES[0])
    with pytest.raises(ConfigError, match="max_new_tokens"):
        scheduler.stream(QUERY, MEMORIES[0], 0)
    with pytest.raises(ArgumentError, match="queries"):
        scheduler.answer_batch(QUERY, MEMORIES[0])
    assert scheduler.answer_batch([], MEMORIES[0]) == [] and scheduler.list() == []


def test_answers_for_async_code(qwen3: HFBackend) -> None:
    right = {memory.id: as_text(qwen3, memory) for memory in MEMORIES[:3]}

    async def ask(scheduler: MemScheduler, memory: TextualMemoryItem) -> bool:
        answer = await scheduler.aanswer(QUERY, memory, 8)
        streamed = [token.id async for token in scheduler.astream(QUERY, memory, 8)]
        return answer.token_ids == tuple(streamed) == right[memory.id]

    async def main() -> list[bool]:
        with scheduler_on(qwen3) as scheduler:
            scheduler.start()
            found = list(await asyncio.gather(*(ask(scheduler, memory) for memory in MEMORIES[:3] * 2)))
            with pytest.raises(PromptError, match="The query is empty"):
                await anext(scheduler.astream("", MEMORIES[0]))
            stopped = scheduler.astream(QUERY, MEMORIES[0], 200)
            await anext(stopped)
            await stopped.aclose()
        return [*found, within(10, lambda: not scheduler._answers and not scheduler.gate._running)]

    assert all(asyncio.run(main()))


def test_a_batch_keeps_what_its_first_answer_computes(engine: HFBackend) -> None:
    alone = [scheduler_on(engine).answer(query, MEMORIES[0], 6).token_ids for query in QUERIES]
    scheduler = scheduler_on(engine)
    for first_hits in (0, 1):
        answers = scheduler.answer_batch(QUERIES, MEMORIES[0], 6)
        assert [answer.token_ids for answer in answers] == alone
        assert [answer.cached_tokens > 0 for answer in answers] == [first_hits == 1, True, True]
    stats = scheduler.stats()
    assert (stats.hits, stats.misses, stats.admissions) == (5, 1, 1)
    scheduler.tick()
    assert scheduler.planner.table.now == 6


def test_with_a_thread_the_answering_thread_keeps_and_builds_nothing(qwen3: HFBackend, tmp_path: Path) -> None:
    with sized(qwen3, tmp_path, 1, 3) as scheduler:
        scheduler.start(0.05)
        kept_in: list[int] = []
        put = scheduler.items.put

        def watched(item: object, tier: str) -> None:
            kept_in.append(threading.get_ident())
            put(item, tier)  # type: ignore[arg-type]

        scheduler.items.put = watched  # type: ignore[method-assign, assignment]
        for memory in MEMORIES[:3]:
            assert scheduler.answer(QUERY, memory, 8).token_ids == as_text(qwen3, memory)
            assert within(10, lambda memory=memory: memory.id in scheduler.index.tiers())  # type: ignore[misc]
        assert scheduler.answer(QUERY, MEMORIES[2], 8).cached_tokens > 50
    assert len(kept_in) == 3 and threading.get_ident() not in kept_in


def test_what_waits_is_bounded_forgotten_and_kept_at_close(
    qwen3: HFBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = sized(qwen3, tmp_path, 0, 6)
    monkeypatch.setattr(MemScheduler, "is_ticking", property(lambda self: True))  # a thread that comes to nothing
    for memory in MEMORIES[: MOST_WAITING + 1]:
        scheduler.answer(QUERY, memory, 1)
    assert scheduler.skipped_admissions == 1 and scheduler.index.tiers() == {}
    scheduler.forget("m0")
    assert [used[0].id for used, _ in scheduler._kept] == ["m1", "m2", "m3"]
    scheduler.close()
    assert scheduler.admissions == MOST_WAITING - 1
    with sized(qwen3, tmp_path, 0, 6) as again:
        assert again.index.tiers().keys() == {"m1", "m2", "m3"}
