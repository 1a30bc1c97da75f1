"""A tier that is slower than prefilling: its loads are measured, not done while they do not pay, and done again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from kvmem.backends.hf import HFBackend
from kvmem.costs import Costs, kv_bytes_a_token
from kvmem.lending import PROBE_AFTER
from kvmem.loads import LoadTimes
from kvmem.scheduler import MemScheduler
from tests.scheduler.test_scheduler import MEMORIES, QUERY, as_text, use
from tests.tiny import memory_on


class SlowLink(LocalFileSystem):
    """A folder behind a link that sleeps before each file that is fetched."""

    protocol = "slowlink"
    delay_s = 0.0
    fetched = 0

    def get_file(self, rpath: str, lpath: str, **more: object) -> None:
        type(self).fetched += 1
        time.sleep(type(self).delay_s)
        super().get_file(rpath, lpath, **more)


fsspec.register_implementation("slowlink", SlowLink, clobber=True)


@pytest.fixture
def scheduler(qwen3: HFBackend, tmp_path: Path) -> Iterator[MemScheduler]:
    """Everything is cold; prefilling a memory is said to take some 0.4 s, and what a load takes is measured."""
    costs = Costs(0.001, 5e-3, 0.0, kv_bytes_a_token(qwen3))
    budget = {"cold": 1 << 30}
    made = MemScheduler(memory_on(qwen3), "benefit_per_byte", budget, costs=costs, cold=f"slowlink://{tmp_path}/cold")
    SlowLink.delay_s, SlowLink.fetched = 0.0, 0
    yield made
    made.close()


def test_a_slow_store_is_not_waited_for(qwen3: HFBackend, scheduler: MemScheduler) -> None:
    SlowLink.delay_s = 1.5
    use(scheduler, MEMORIES[0], 6)
    assert [move.target for move in scheduler.tick()] == ["cold"]
    assert SlowLink.fetched == 1, "measured beside the requests, so that the first of them knows"
    answer = scheduler.answer(QUERY, [MEMORIES[0]], 8)
    assert SlowLink.fetched == 1, "the request did not wait for it"
    assert answer.cached_tokens == 0 and answer.token_ids == as_text(qwen3, MEMORIES[0])
    assert "m0 was not loaded: loading its" in answer.note and "from cold takes about 1." in answer.note
    assert "is in cold." in scheduler.explain("m0") and "; not loaded when wanted: " in scheduler.explain("m0")
    assert scheduler.lender.not_worth_loading == 1


def test_a_store_that_is_fast_again_is_used_again(qwen3: HFBackend, scheduler: MemScheduler) -> None:
    SlowLink.delay_s = 1.5
    use(scheduler, MEMORIES[0], 6)
    scheduler.tick()
    SlowLink.delay_s = 0.0
    for _ in range(PROBE_AFTER - 1):
        assert scheduler.answer(QUERY, [MEMORIES[0]], 1).cached_tokens == 0
    scheduler.tick()
    assert SlowLink.fetched == 1, "not yet asked again"
    rounds = 0
    while not scheduler.answer(QUERY, [MEMORIES[0]], 1).cached_tokens:
        scheduler.tick()
        rounds += 1
        assert rounds < 10 * PROBE_AFTER
    answer = scheduler.answer(QUERY, [MEMORIES[0]], 8)
    assert answer.cached_tokens > 50 and answer.note == "" and answer.token_ids == as_text(qwen3, MEMORIES[0])
    assert "; loaded when wanted: " in scheduler.explain("m0")


def test_an_estimate_is_a_line_that_outliers_do_not_move() -> None:
    times = LoadTimes()
    assert times.expected_s("cold", 10) is None
    times.took("cold", 1000, 0.5)
    assert times.expected_s("cold", 2000) == pytest.approx(1.0), "one size tells no fixed part"
    for nbytes in (2000, 4000, 8000, 16000):
        times.took("cold", nbytes, 0.4 + 1e-4 * nbytes)
    times.took("cold", 1000, 30.0)
    assert times.expected_s("cold", 32000) == pytest.approx(0.4 + 3.2, rel=0.2)
    for _ in range(9):
        times.took("cold", 1000, 0.01)
    assert times.expected_s("cold", 1000) == pytest.approx(0.01), "what is long ago is forgotten"
    assert times.expected_s("disk", 1000) is None
