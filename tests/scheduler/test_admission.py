"""What a miss computed is kept from the first use, where it is worth its bytes, and answers stay those of the text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.traces import Event, Trace, simulate
from kvmem import TextualMemoryItem
from kvmem.cache import dynamic_cache
from kvmem.engines.generation import Sampling
from kvmem.engines.graph import HFGraphBackend
from kvmem.engines.huggingface import HFBackend
from kvmem.models.loading import Loaded
from kvmem.prompt.template import TokenizedPrompt
from kvmem.scheduler.cost_model import Costs, kv_bytes_a_token
from kvmem.scheduler.groups import group_id
from kvmem.scheduler.planner import Planner
from kvmem.scheduler.policies import policy
from kvmem.scheduler.scheduler import MemScheduler
from tests.helpers.architectures import tiny_architecture
from tests.helpers.tiny import memory_on, pairs
from tests.scheduler.test_scheduler import MEMORIES, QUERY, as_text, scheduler_on

TEXTS = [TextualMemoryItem(id=f"t{i}", memory=memory) for i, (memory, _) in enumerate(pairs(20, 300, seed=3))]


def zipf(texts: int, uses: int, seed: int) -> list[int]:
    """Each text once, and draws of a text, the i-th as often as 1 / i, in random order: `uses` in all."""
    chance, shares = np.random.default_rng(seed), 1 / np.arange(1, texts + 1)
    draws = chance.choice(texts, uses - texts, p=shares / shares.sum())
    order: list[int] = chance.permutation([*range(texts), *draws]).tolist()
    return order


def hits_of(scheduler: MemScheduler, order: list[int]) -> int:
    hits = 0
    for number in order:
        hits += scheduler.answer(QUERY, TEXTS[number], 1).cached_tokens > 0
        scheduler.tick()
    return hits


def test_of_texts_that_fit_every_use_after_the_first_is_a_hit(qwen3: HFBackend) -> None:
    """80 questions over 20 texts, in Zipf's order. Without admission most of the hits are lost to waiting."""
    order = zipf(20, 80, seed=0)
    scheduler = scheduler_on(qwen3)
    assert hits_of(scheduler, order) == 60
    assert scheduler.admissions == 20 and scheduler.builds == 0, "no second prefill"
    without = hits_of(scheduler_on(qwen3, admit_misses=False), order)
    assert 0 < without < 50, f"{without} hits"


@pytest.fixture(scope="module")
def graph(qwen3: HFBackend) -> HFGraphBackend:
    return HFGraphBackend(Loaded(qwen3.model, qwen3.tokenizer, qwen3.fingerprint.origin))


@pytest.fixture(params=["qwen3", "graph", "sliding", "states"])
def engine(request: pytest.FixtureRequest) -> HFBackend:
    """Caches that are cut at the memory's end, and those of which only the last position is kept."""
    if request.param == "states":
        return tiny_architecture("qwen3_next")
    backend = request.getfixturevalue(request.param)
    assert isinstance(backend, HFBackend)
    return backend


def test_the_answers_are_those_without_a_scheduler(engine: HFBackend, tmp_path: Path) -> None:
    """The miss that is kept, the hit after it, and the hit of the next process, whatever the model's layers keep."""
    costs = Costs(0.1, 1.0, 0.0, kv_bytes_a_token(engine), {"disk": 0.0}, engine.fingerprint.kv_bytes(0))

    def opened() -> MemScheduler:
        return MemScheduler(memory_on(engine), "benefit_per_byte", {"disk": 1 << 30}, tmp_path, costs)

    expected = [as_text(engine, text) for text in TEXTS[:2]]
    stored = [len(engine.template.memory_tokens(text.memory).token_ids) for text in TEXTS[:2]]
    with opened() as scheduler:
        for text, token_ids, tokens in zip(TEXTS, expected, stored, strict=False):
            miss, hit = (scheduler.answer(QUERY, text, 8) for _ in range(2))
            assert miss.token_ids == hit.token_ids == token_ids
            assert miss.cached_tokens == 0 and hit.cached_tokens == tokens
        assert scheduler.builds == 0 and scheduler.failures == {}
    with opened() as again:
        hit = again.answer(QUERY, TEXTS[0], 8)
        assert hit.token_ids == expected[0] and hit.cached_tokens == stored[0]


def test_it_is_what_a_build_gives(engine: HFBackend) -> None:
    costs = Costs(0.001, 1e-4, 0.0, kv_bytes_a_token(engine), {}, engine.fingerprint.kv_bytes(0))
    scheduler = MemScheduler(memory_on(engine), "lfu", {"ram": 1 << 30}, costs=costs)
    scheduler.answer(QUERY, TEXTS[0], 1)
    ((item_id, _),) = scheduler.index.stored().values()
    built = engine.build(TEXTS[0].memory)
    with scheduler.items.use(item_id) as item:
        assert item.metadata.tokens == built.metadata.tokens and item.metadata.build_s > 0
        for kept, expected in zip(
            dynamic_cache.contents_of(item.kv_cache), dynamic_cache.contents_of(built.kv_cache), strict=True
        ):
            assert kept.keys() == expected.keys()
            for name in kept:
                torch.testing.assert_close(kept[name], expected[name], rtol=1e-3, atol=1e-3)


def test_of_several_texts_the_first_is_kept_and_the_group_once_it_is_one(engine: HFBackend) -> None:
    costs = Costs(0.001, 1e-4, 0.0, kv_bytes_a_token(engine), {}, engine.fingerprint.kv_bytes(0))
    scheduler = MemScheduler(memory_on(engine), "benefit_per_byte", {"ram": 1 << 30}, costs=costs, max_builds=0)
    together = TEXTS[:2]
    prompt = engine.template.split(scheduler.index.joint_tokens(together), QUERY)
    expected = tuple(engine.decode(TokenizedPrompt((), prompt.ids), None, 6, Sampling()))
    cached = []
    for _ in range(5):
        answer = scheduler.answer(QUERY, together, 6)
        assert answer.token_ids == expected
        cached.append(answer.cached_tokens)
        scheduler.tick()
    whole = len(scheduler.index.joint_tokens(together).token_ids)
    of_first = 0 if engine.keeps_last_position else scheduler.index.tokens(TEXTS[0]).body_end
    assert cached[0] == 0 and cached[-1] == whole and of_first <= cached[1] < whole
    assert group_id(["t0", "t1"]) in scheduler.index.tiers() and scheduler.builds == 0


def test_a_scan_does_not_replace_what_is_used_often() -> None:
    """Five memories are half of the uses; each of the others is used once. There is room for eight."""
    chance = np.random.default_rng(1)
    often, uses = 5, 600
    events = [Event("use", int(chance.integers(often)) if i % 2 else often + i) for i in range(uses)]
    trace = Trace("scan", 1, (200,) * (often + uses), 20, tuple(events))
    costs = Costs(0.001, 1e-4, 1e-8, 1000)
    budget = {"ram": 8 * costs.nbytes(200)}
    of = {
        (name, admit): simulate(trace, policy(name), budget, costs, admit_misses=admit)
        for name in ("benefit_per_byte", "lru")
        for admit in (True, False)
    }
    most = uses // 2 - often
    assert of["benefit_per_byte", True].hits >= 0.97 * most
    assert of["benefit_per_byte", True].hits >= of["benefit_per_byte", False].hits
    assert of["benefit_per_byte", True].hits > of["lru", True].hits
    assert of["benefit_per_byte", True].builds == 0


def test_a_longer_scan_leaves_the_hot_texts_in_place(qwen3: HFBackend) -> None:
    """On a model: two texts are asked three times each, then 18 others once each; there is room for three."""
    longest = max(len(qwen3.template.memory_tokens(text.memory).token_ids) for text in TEXTS)
    scheduler = scheduler_on(qwen3, ram=3 * longest * kv_bytes_a_token(qwen3))
    hits_of(scheduler, [0, 1] * 3)
    hits_of(scheduler, list(range(2, 20)))
    assert {"t0", "t1"} <= scheduler.index.tiers().keys() and scheduler.admissions > 10
    assert hits_of(scheduler, [0, 1]) == 2


def test_what_is_forgotten_or_edited_meanwhile_is_not_kept(qwen3: HFBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_on(qwen3)
    generate = qwen3.generate

    def meanwhile(act: Callable[[], object]) -> Callable[..., object]:
        def answered(*args: object) -> object:
            answer = generate(*args)  # type: ignore[arg-type]
            act()
            return answer

        return answered

    scheduler.observe(MEMORIES[0], QUERY)
    monkeypatch.setattr(qwen3, "generate", meanwhile(lambda: scheduler.forget("m0")))
    scheduler.answer(QUERY, MEMORIES[0], 1)
    assert scheduler.items.ids() == [] and scheduler.index.texts == {}
    edited = TextualMemoryItem(id="m1", memory="Something else altogether, and longer than nothing.")
    store = scheduler.index.store
    monkeypatch.setattr(qwen3, "generate", generate)

    def edit_and_store(*args: object) -> object:
        scheduler.observations.set_text(edited)
        return store(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(scheduler.index, "store", edit_and_store)
    scheduler.answer(QUERY, MEMORIES[1], 1)
    assert scheduler.items.ids() == [] and scheduler.admissions == 0
    monkeypatch.undo()
    assert scheduler.answer(QUERY, edited, 8).token_ids == as_text(qwen3, edited)


def test_a_view_that_answered_elsewhere_is_kept_by_observe(qwen3: HFBackend) -> None:
    scheduler = scheduler_on(qwen3)
    with scheduler.view(TEXTS[0]) as cache:
        text = "".join(token.text for token in scheduler.backend.stream(QUERY, cache, 6))
    scheduler.observe(TEXTS[0], QUERY, cache)
    with scheduler.view(TEXTS[0]) as cache:
        assert cache.get_seq_length() > 50
        assert "".join(token.text for token in scheduler.backend.stream(QUERY, cache, 6)) == text


def test_the_write_has_to_pay(tmp_path: Path) -> None:
    planner = Planner(policy("benefit_per_byte"), {"disk": 1 << 30}, Costs(0.001, 1e-4, 0.0, 1000))
    planner.sized("m", 500)
    planner.used("m", 10)
    assert [move.kind for move in planner.admit("m", {})] == ["admit"]
    assert planner.admit("m", {}, write_s=lambda tier, nbytes: 1.0) == []
    assert planner.admit("m", {"m": "disk"}) == [] and planner.admit("unknown", {}) == []
    slow = Planner(policy("lru"), {"disk": 1 << 30}, Costs(0.001, 1e-4, 0.0, 1000, {"disk": 1.0}))
    slow.sized("m", 500)
    slow.used("m", 10)
    assert slow.admit("m", {}) == [], "it would not be loaded"
