"""Builds that wait for requests and stop midway, on each engine that can pause between layers."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from kvmem import TextualMemoryItem
from kvmem.cache import dynamic_cache
from kvmem.engines.graph.backend import HFGraphBackend
from kvmem.engines.graph.config import GraphConfig
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import BuildCancelled
from kvmem.scheduler.build_gate import BuildGate
from tests.helpers.tiny import SHAPES, loaded
from tests.scheduler.test_scheduler import MEMORIES, QUERY, scheduler_on, use

OPEN: dict[str, Callable[[], HFBackend]] = {
    "huggingface": lambda: HFBackend(loaded(SHAPES["qwen3"])),
    "hf_graph": lambda: HFGraphBackend(loaded(SHAPES["qwen3"]), "chat", GraphConfig(capacity_tokens=2048, buffers=1)),
}


@pytest.fixture(scope="module", params=sorted(OPEN))
def engine(request: pytest.FixtureRequest) -> HFBackend:
    return OPEN[request.param]()


def test_pausing_changes_no_bit(engine: HFBackend) -> None:
    calls: list[str] = []
    layers = engine.model_config.num_hidden_layers
    text = MEMORIES[0].memory
    paused = engine.build(text, between_layers=lambda: calls.append(threading.current_thread().name))
    assert calls == [threading.current_thread().name] * layers
    plain = engine.build(text)
    assert len(calls) == layers, "a later build does not call it"
    assert paused.metadata.tokens == plain.metadata.tokens and paused.metadata.kv_bytes == plain.metadata.kv_bytes
    for one, other in zip(*(dynamic_cache.layers_of(item.kv_cache) for item in (paused, plain)), strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_pausing_behind_earlier_turns_changes_no_bit(engine: HFBackend) -> None:
    turns = ({"role": "user", "content": MEMORIES[0].memory}, {"role": "assistant", "content": "Yes."})
    base = engine.build(turns[:1])
    calls: list[None] = []
    paused = engine.build(turns, base=base, between_layers=lambda: calls.append(None))
    plain = engine.build(turns, base=base)
    assert len(calls) == engine.model_config.num_hidden_layers
    for one, other in zip(*(dynamic_cache.layers_of(item.kv_cache) for item in (paused, plain)), strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_a_build_that_raises_between_layers_ends_there(engine: HFBackend) -> None:
    before = engine.generate(QUERY, None, 6)
    calls: list[None] = []

    def second_raises() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise BuildCancelled("enough")

    with pytest.raises(BuildCancelled, match="enough"):
        engine.build(MEMORIES[0].memory, between_layers=second_raises)
    assert len(calls) == 2 and engine.generate(QUERY, None, 6) == before
    again = engine.build(MEMORIES[0].memory)
    assert again.metadata.token_count == again.kv_cache.get_seq_length() and len(calls) == 2


def test_a_build_waits_for_a_request_that_uses_the_engine(engine: HFBackend) -> None:
    scheduler = scheduler_on(engine)
    use(scheduler, MEMORIES[0], 6)
    with scheduler.gate.request():
        ticking = threading.Thread(target=scheduler.tick)
        ticking.start()
        while not scheduler.gate.layers_waited:
            assert ticking.is_alive(), "the build did not wait"
            ticking.join(0.001)
        during = scheduler.backend.generate(QUERY, None, 6)  # the request's own forward passes do not wait
        assert ticking.is_alive() and scheduler.builds == 0
    ticking.join(10)
    assert not ticking.is_alive() and scheduler.builds == 1
    assert scheduler.backend.generate(QUERY, None, 6) == during


def test_an_edit_cancels_a_build_midway(engine: HFBackend) -> None:
    scheduler = scheduler_on(engine)
    use(scheduler, MEMORIES[0], 6)
    with scheduler.gate.request():
        ticking = threading.Thread(target=scheduler.tick)
        ticking.start()
        while not scheduler.gate.layers_waited:
            assert ticking.is_alive(), "the build did not wait"
            ticking.join(0.001)
        scheduler.update(TextualMemoryItem(id="m0", memory=MEMORIES[1].memory))
        ticking.join(10)
        assert not ticking.is_alive()
    assert scheduler.cancelled_builds == 1 and scheduler.builds == 0 and scheduler.items.ids() == []


def test_a_gate_lets_one_layer_pass_beside_each_request() -> None:
    gate = BuildGate()
    with gate.build() as between_layers:
        between_layers()
        with gate.request():
            between_layers()
            waiting = threading.Thread(target=between_layers)
            waiting.start()
            while not gate.layers_waited:
                waiting.join(0.001)
            assert waiting.is_alive()
        waiting.join(10)
        assert not waiting.is_alive()
        gate.cancel()
        with pytest.raises(BuildCancelled):
            between_layers()
    with gate.build() as between_layers:
        between_layers()
