"""What a scheduler tells of itself: memories, figures by tier, events, log records."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from kvmem import TextualMemoryItem
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.scheduler import MemoryEvent
from kvmem.scheduler.cost_model import kv_bytes_a_token
from kvmem.scheduler.events import EventLog, EventStream
from tests.scheduler.test_closing import sized
from tests.scheduler.test_scheduler import MEMORIES, QUERY, scheduler_on, use


def test_stats_are_those_of_the_answers(qwen3: HFBackend, tmp_path: Path) -> None:
    with sized(qwen3, tmp_path, 1, 1) as scheduler:
        answers = [scheduler.answer(QUERY, MEMORIES[i], 1) for i in (0, 0, 1, 0, 1)]
        stats = scheduler.stats()
        assert [answer.cached_tokens > 0 for answer in answers] == [False, True, False, True, True]
        assert (stats.hits, stats.misses, stats.hit_rate) == (3, 2, 0.6)
        assert stats.cached_tokens == sum(answer.cached_tokens for answer in answers)
        assert stats.computed_tokens == sum(answer.prompt_tokens - answer.cached_tokens for answer in answers)
        assert stats.admissions == 2 and stats.builds == 0 and stats.prefill_s > 0
        ram, disk = stats.tiers["ram"], stats.tiers["disk"]
        assert list(stats.tiers) == ["ram", "disk"] and ram.hits + disk.hits == 3
        assert ram.memories == disk.memories == 1 and 0 < disk.used_bytes <= disk.budget_bytes
        assert disk.loads == disk.hits and disk.load_s > 0 and disk.writes == 1 and disk.write_s > 0
        assert ram.loads == ram.writes == 0
        before = stats
        use(scheduler, MEMORIES[2], 9)
        kinds = [move.kind for move in scheduler.tick()]
        stats = scheduler.stats()
        assert stats.builds == kinds.count("build") > 0 and stats.build_s > 0
        assert stats.evictions == before.evictions + kinds.count("evict") > before.evictions
        assert stats.demotions == before.demotions + kinds.count("demote")


def test_the_list_says_where_each_memory_is(qwen3: HFBackend) -> None:
    scheduler = scheduler_on(qwen3)
    scheduler.answer(QUERY, MEMORIES[0], 1)
    scheduler.observe(MEMORIES[1], QUERY)
    scheduler.update(TextualMemoryItem(id="m1", memory="Edited."))
    first, second = scheduler.list()
    tokens = len(scheduler.index.tokens(MEMORIES[0]).token_ids)
    assert (first.id, first.members, first.tier, first.tokens, first.uses) == ("m0", ("m0",), "ram", tokens, 1)
    assert first.nbytes == tokens * kv_bytes_a_token(qwen3) and first.lossy == "" and first.expires_in_s is None
    assert (second.id, second.tier, second.nbytes, second.uses, second.edits) == ("m1", None, 0, 1, 1)


def test_events_follow_a_memory_through_its_life(
    qwen3: HFBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "kvmem.scheduler"), sized(qwen3, tmp_path, 1, 1) as scheduler:
        stream = scheduler.events()
        scheduler.answer(QUERY, MEMORIES[0], 1, namespace="acme")
        use(scheduler, MEMORIES[1], 5)
        scheduler.tick()
        for _ in range(9):
            scheduler.observe(MEMORIES[0], QUERY, namespace="acme")
        scheduler.tick()
        scheduler.tick()
        scheduler.update(TextualMemoryItem(id="m1", memory="Edited."))
    events = list(stream)  # it ended as the scheduler closed
    assert list(scheduler.events()) == [] and stream.missed == 0
    told = [(event.kind, event.memory_id, event.source, event.target) for event in events]
    assert told[:3] == [
        ("admitted", "m0", None, "ram"),
        ("demoted", "m0", "ram", "disk"),
        ("built", "m1", None, "ram"),
    ]
    assert ("promoted", "m0", "disk", "ram") in told and ("evicted", "m1", None, None) in told
    assert told[-1] == ("demoted", "m0", "ram", "disk") and events[-1].reason == "the scheduler closes"
    assert {event.namespace for event in events if event.memory_id == "m0"} == {"acme"}
    assert any(record.getMessage() == "m1 built to ram" for record in caplog.records)
    assert {record.name.rpartition(".")[0] for record in caplog.records} == {"kvmem.scheduler"}


def test_what_is_refused_is_told(
    qwen3: HFBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = scheduler_on(qwen3)
    stream = scheduler.events()
    use(scheduler, MEMORIES[0], 5)

    def out_of_memory(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(qwen3, "build", out_of_memory)
    assert scheduler.tick() == []
    event = next(stream)
    assert (event.kind, event.memory_id, event.reason) == ("refused", "m0", "RuntimeError: out of memory")
    assert scheduler.stats().refusals == 1 and "m0 refused: RuntimeError: out of memory" in caplog.text


def test_a_reader_waits_for_events_and_a_slow_one_loses_the_oldest() -> None:
    log = EventLog()
    stream, slow = log.stream(), EventStream(2)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.extend(event.memory_id for event in stream))
    reader.start()
    for i in range(3):
        log.add("built", f"m{i}", None, "ram")
        slow.put(MemoryEvent("built", f"m{i}"))
    log.close()
    slow.end()
    reader.join(10)
    assert read == ["m0", "m1", "m2"] and not reader.is_alive()
    assert [event.memory_id for event in slow] == ["m1", "m2"] and slow.missed == 1
