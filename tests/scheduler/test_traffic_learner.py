"""What a server learns of its traffic, without an engine: which prefixes, at which price, and what it forgets."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kvmem.engines.vllm.connector import LearnConfig, Lesson, learner_of
from kvmem.scheduler.seen_prefixes import SeenPrefixes
from kvmem.scheduler.traffic_learner import TrafficLearner
from tests.helpers.stored import FINGERPRINT

STEP, AFTER = 32, 3
TOKEN_BYTES = FINGERPRINT.kv_bytes(1)
FAQ_TOKENS = 320
ONE_GIB = 2.0**30


def text(seed: int, tokens: int) -> list[int]:
    return random.Random(seed).choices(range(50_000), k=tokens)


def learner(folder: Path, tokens: float = 1e6) -> TrafficLearner:
    """One with space for so many tokens, on an engine that takes a millisecond for each."""
    made = learner_of({"budget_gib": tokens * TOKEN_BYTES / ONE_GIB, "after": AFTER}, folder, FINGERPRINT, 16)
    assert isinstance(made, TrafficLearner)
    if made.calibration is None:
        for new in (100, 200, 400):
            made.prefilled(new, 0, new / 1000)
    return made


def ask(by: TrafficLearner, ids: list[int], seed: int, namespace: str = "", held: int = 0) -> Lesson | None:
    return by.watch(namespace, ids + text(seed, 20), held, True)


def learned(by: TrafficLearner, ids: list[int], seed: int, namespace: str = "") -> Lesson:
    """Asks until there is a lesson, and has it saved to a file."""
    for number in range(AFTER):
        lesson = ask(by, ids, 1000 * seed + number, namespace)
        assert (lesson is not None) == (number == AFTER - 1)
    assert lesson is not None
    for name in lesson.evicted:
        (by.folder / name).unlink()
    (by.folder / f"file {seed}").touch()
    by.saved(lesson, f"file {seed}", lesson.tokens * TOKEN_BYTES, 0.001)
    return lesson


def test_the_longest_prefix_that_comes_again_is_learned_once(tmp_path: Path) -> None:
    by, faq = learner(tmp_path), text(1, FAQ_TOKENS + 5)
    assert learned(by, faq, 1).tokens == FAQ_TOKENS, "whole steps"
    assert ask(by, faq, 7) is None and by.nbytes == FAQ_TOKENS * TOKEN_BYTES
    (tmp_path / "file 1").unlink()  # by a client
    lesson = ask(by, faq, 8)
    assert lesson is not None and lesson.tokens == FAQ_TOKENS and not lesson.evicted


def test_an_edited_text_and_another_namespace_are_other_prefixes(tmp_path: Path) -> None:
    by, faq = learner(tmp_path), text(1, FAQ_TOKENS)
    edited = [*faq[:-40], *text(2, 40)]
    for number, (ids, namespace) in enumerate([(faq, "a"), (faq, "b"), (faq, ""), (faq, "a"), (edited, "a")]):
        lesson = ask(by, ids, number, namespace)
        assert (lesson.tokens if lesson else 0) == (256 if number == 4 else 0), "what the edited text shares"
    assert lesson is not None
    by.not_saved(lesson, "")
    other = ask(by, faq, 9, "a")
    assert other is not None and other.tokens == FAQ_TOKENS and other.id != lesson.id
    assert by.seen.id_of("a", faq) != by.seen.id_of("b", faq)


def test_what_a_memory_of_the_store_covers_is_not_learned(tmp_path: Path) -> None:
    by, faq = learner(tmp_path), text(1, FAQ_TOKENS)
    assert all(ask(by, faq, number, held=FAQ_TOKENS - 10) is None for number in range(2 * AFTER))
    lesson = ask(by, faq, 99)
    assert lesson is not None and lesson.tokens == FAQ_TOKENS, "the memory is gone"


def test_a_full_budget_keeps_what_comes_more_often(tmp_path: Path) -> None:
    by = learner(tmp_path, 2.5 * FAQ_TOKENS)
    often, seldom, new = (text(seed, FAQ_TOKENS) for seed in (1, 2, 3))
    learned(by, often, 1)
    learned(by, seldom, 2)
    for number in range(10):
        assert ask(by, often, number) is None
    lessons = [lesson for number in range(10) if (lesson := ask(by, new, 500 + number))]
    assert [lesson.evicted for lesson in lessons] == [("file 2",)], "and it is learned once"
    assert by.nbytes == 2 * FAQ_TOKENS * TOKEN_BYTES


def test_a_write_that_costs_more_than_it_saves_is_not_done(tmp_path: Path) -> None:
    by, faq = learner(tmp_path), text(1, FAQ_TOKENS)
    by.writes.record("disk", FAQ_TOKENS * TOKEN_BYTES, 60.0)
    assert all(ask(by, faq, number) is None for number in range(20))
    assert "a write takes about 60.000 s" in by.explain("", faq)
    slow = learner(tmp_path / "slow")
    slow.loaded(FAQ_TOKENS * TOKEN_BYTES, 60.0)
    assert all(ask(slow, faq, number) is None for number in range(20)), "it would not pay to load it"


def test_a_failure_is_tried_again_later(tmp_path: Path) -> None:
    by, faq = learner(tmp_path), text(1, FAQ_TOKENS)
    lessons = 0
    for number in range(40):
        lesson = ask(by, faq, number)
        if lesson is not None:
            by.not_saved(lesson, "The disk is full.")
            lessons += 1
    assert lessons == 2 and "failed 2 times, lately: StorageError: The disk is full." in by.explain("", faq)


def test_counts_and_costs_survive_a_restart(tmp_path: Path) -> None:
    by, faq, other = learner(tmp_path), text(1, FAQ_TOKENS), text(2, FAQ_TOKENS)
    learned(by, faq, 1, "acme")
    for number in range(AFTER):
        by.watch("", other + text(number, 20), 0, False)
    by.close()
    again = TrafficLearner(tmp_path, FINGERPRINT, STEP, LearnConfig())
    again.adopt("file 1", "acme", faq)
    assert again.nbytes == FAQ_TOKENS * TOKEN_BYTES
    assert again.planner.table.state() == by.planner.table.state()
    assert again.planner.costs == by.planner.costs
    assert ask(again, faq, 50, "acme") is None
    lesson = ask(again, other, 51)
    assert lesson is not None and lesson.tokens == FAQ_TOKENS, "it was a candidate before"
    by.state_path.write_text("{")
    assert TrafficLearner(tmp_path, FINGERPRINT, STEP, LearnConfig()).planner.table.now == 0
    lost = learner(tmp_path)
    lost.adopt("file 1", "acme", faq)
    assert lost.nbytes == FAQ_TOKENS * TOKEN_BYTES and ask(lost, faq, 1, "acme") is None


def test_memory_of_prefixes_is_bounded(tmp_path: Path) -> None:
    seen = SeenPrefixes(STEP, most=100)
    faq = text(1, FAQ_TOKENS)
    for number in range(200):
        seen.see("", text(number + 10, 640))
        path = seen.see("", faq)
    assert len(seen.counts) == 100 and path[-1].count == pytest.approx(200, rel=0.05)
    by = learner(tmp_path)
    for number in range(600):
        for _ in range(AFTER):
            by.watch("", text(number, 64), 0, False)
    assert len(by.planner.table) <= 513
