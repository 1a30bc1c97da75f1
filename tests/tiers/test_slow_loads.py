"""A tier that is slower than prefilling is not used, and is used again once it is faster. Loads are measured."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from kvmem import TextualMemoryItem
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.scheduler.cost_model import Costs, kv_bytes_a_token
from kvmem.scheduler.prefix_selection import PROBE_AFTER
from kvmem.scheduler.scheduler import MemScheduler
from kvmem.tiers.load_times import WINDOW, LoadTimes
from tests.helpers.tiny import memory_on
from tests.scheduler.test_scheduler import MEMORIES, QUERY, as_text, use


class SlowLink(LocalFileSystem):
    """A folder that sleeps before each file that is fetched."""

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
    """A scheduler with a cold tier only. Its cost model says 0.4 s for a prefill; loads are measured."""
    costs = Costs(0.001, 5e-3, 0.0, kv_bytes_a_token(qwen3))
    budget = {"cold": 1 << 30}
    made = MemScheduler(memory_on(qwen3), "benefit_per_byte", budget, costs=costs, cold=f"slowlink://{tmp_path}/cold")
    SlowLink.delay_s, SlowLink.fetched = 0.0, 0
    yield made
    made.close()


def test_a_slow_store_is_not_used(qwen3: HFBackend, scheduler: MemScheduler) -> None:
    SlowLink.delay_s = 1.5
    use(scheduler, MEMORIES[0], 6)
    assert [move.target for move in scheduler.tick()] == ["cold"]
    assert SlowLink.fetched == 1, "measured beside the requests, so that the first of them knows"
    answer = scheduler.answer(QUERY, [MEMORIES[0]], 8)
    assert SlowLink.fetched == 1, "the request did not wait for it"
    assert answer.cached_tokens == 0 and answer.token_ids == as_text(qwen3, MEMORIES[0])
    assert "m0 was not loaded: loading its" in answer.note and "from cold takes about 1." in answer.note
    assert "is in cold." in scheduler.explain("m0") and "; not loaded when wanted: " in scheduler.explain("m0")
    assert scheduler.prefix_selector.not_worth_loading == 1


def test_a_store_that_is_fast_again_is_used_again(qwen3: HFBackend, scheduler: MemScheduler) -> None:
    SlowLink.delay_s = 1.5
    use(scheduler, MEMORIES[0], 6)
    scheduler.tick()
    SlowLink.delay_s = 0.0
    for _ in range(PROBE_AFTER - 1):
        assert scheduler.answer(QUERY, [MEMORIES[0]], 1).cached_tokens == 0
    scheduler.tick()
    assert SlowLink.fetched == 1, "not probed yet"
    rounds = 0
    while not scheduler.answer(QUERY, [MEMORIES[0]], 1).cached_tokens:
        scheduler.tick()
        rounds += 1
        assert rounds < 10 * PROBE_AFTER
    answer = scheduler.answer(QUERY, [MEMORIES[0]], 8)
    assert answer.cached_tokens > 50 and answer.note == "" and answer.token_ids == as_text(qwen3, MEMORIES[0])
    assert "; loaded when wanted: " in scheduler.explain("m0")


def test_a_load_resets_the_count_of_declined_loads(qwen3: HFBackend, scheduler: MemScheduler) -> None:
    """A load measures the tier, so the count of declined loads before the next probe starts again."""
    short = TextualMemoryItem(id="short", memory=MEMORIES[1].memory[:60])
    for memory in (MEMORIES[0], short):
        use(scheduler, memory, 20)
        scheduler.tick()
    assert set(scheduler.index.tiers()) == {"m0", "short"}
    small, large = (scheduler.items.nbytes(scheduler.index.stored()[id_][0]) for id_ in ("short", "m0"))
    long_s = float(scheduler.planner.costs.saved_s(len(scheduler.index.tokens(MEMORIES[0]).token_ids), 0.0))
    for _ in range(WINDOW):  # recent loads: too slow for the short memory, fast enough for the long one
        scheduler.items.loads.record("cold", small, 0.7 * long_s)
        scheduler.items.loads.record("cold", large, 0.7 * long_s)
    for _ in range(PROBE_AFTER - 1):
        assert scheduler.answer(QUERY, [short], 1).cached_tokens == 0
    fetched = SlowLink.fetched
    assert scheduler.answer(QUERY, [MEMORIES[0]], 1).cached_tokens > 50 and SlowLink.fetched == fetched + 1
    scheduler.items.loads.record("cold", small, 0.7 * long_s)
    assert scheduler.answer(QUERY, [short], 1).cached_tokens == 0
    scheduler.prefix_selector.probe()
    assert SlowLink.fetched == fetched + 1, "1 was declined since"


def test_declined_loads_are_not_counted_if_the_cost_is_given(qwen3: HFBackend, tmp_path: Path) -> None:
    costs = Costs(0.001, 1e-4, 0.0, kv_bytes_a_token(qwen3), {"disk": 1.0})
    made = MemScheduler(memory_on(qwen3), "benefit_per_byte", {"disk": 1 << 30}, tmp_path, costs)
    use(made, MEMORIES[0], 6)
    made.tick()
    for _ in range(3):
        made.answer(QUERY, [MEMORIES[0]], 1)
    assert made.prefix_selector.not_worth_loading == 3 and not made.prefix_selector.declined, (
        "no load will ever clear it"
    )
    made.close()


def test_an_estimate_is_a_line_that_ignores_outliers() -> None:
    times = LoadTimes()
    assert times.expected_s("cold", 10) is None
    times.record("cold", 1000, 0.5)
    assert times.expected_s("cold", 2000) == pytest.approx(1.0), "one size gives no fixed part"
    for nbytes in (2000, 4000, 8000, 16000):
        times.record("cold", nbytes, 0.4 + 1e-4 * nbytes)
    times.record("cold", 1000, 30.0)
    assert times.expected_s("cold", 32000) == pytest.approx(0.4 + 3.2, rel=0.2)
    for _ in range(9):
        times.record("cold", 1000, 0.01)
    assert times.expected_s("cold", 1000) == pytest.approx(0.01), "what is long ago is forgotten"
    assert times.expected_s("disk", 1000) is None
