"""MemScheduler on the vLLM engine of this process: the same planner and journal, and the same tokens either way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmem import MemScheduler, TextualMemoryItem
from kvmem.engines.vllm.backend import VLLMBackend
from kvmem.errors import ConfigError
from kvmem.scheduler import Costs
from tests.helpers.tiny import pairs
from tests.vllm.conftest import on_engine

QUERY = "Which rule is the first?"
TEXTS = [text[:900] for text, _ in pairs(4, 1400, seed=71)]
NEW_TOKENS = 6
Open = Callable[..., MemScheduler]


@pytest.fixture
def opened(slow: VLLMBackend, tmp_path: Path) -> Iterator[Open]:
    """Opens a scheduler in the same folder each time, with costs that make every build worth while."""
    slow.reset(unpin=True)
    made: list[MemScheduler] = []

    def open_(budget: dict[str, int] | None = None, **more: object) -> MemScheduler:
        costs = Costs(0.01, 0.01, 0.0, slow.fingerprint.kv_bytes(1), {"disk": 0.0})
        budgets = budget or {"ram": 1 << 27, "disk": 1 << 28}
        scheduler = MemScheduler(on_engine(slow), "lru", budgets, tmp_path / "state", costs, **more)
        made.append(scheduler)
        return scheduler

    yield open_
    for scheduler in made:
        scheduler.close()
    slow.reset(unpin=True)


def texts(count: int) -> list[TextualMemoryItem]:
    return [TextualMemoryItem(id=f"text {number}", memory=text) for number, text in enumerate(TEXTS[:count])]


def as_text(slow: VLLMBackend, scheduler: MemScheduler, memories: list[TextualMemoryItem]) -> tuple[int, ...]:
    """The answer's tokens when the whole prompt is computed."""
    prompt = slow.template.split(scheduler.index.joint_tokens(memories), QUERY)
    return slow.answer_prompt(type(prompt)((), prompt.ids), None, NEW_TOKENS, cache_salt="direct").token_ids


def test_from_text_to_a_built_memory_to_a_restart(slow: VLLMBackend, opened: Open) -> None:
    scheduler, (memory,) = opened(), texts(1)
    expected = as_text(slow, scheduler, [memory])
    cold = scheduler.answer(QUERY, [memory], NEW_TOKENS)
    assert cold.cached_tokens == 0 and expected[: len(cold.token_ids)] == cold.token_ids
    reads = slow.host_cache().reads
    assert [(move.kind, move.target) for move in scheduler.tick()] == [("build", "ram")]
    while slow.host_cache().reads == reads:  # without a question
        pass
    slow.reset()
    before = slow.host_cache()
    warm = scheduler.answer(QUERY, [memory], NEW_TOKENS)
    assert warm.token_ids == cold.token_ids and warm.text == cold.text and not warm.note
    assert warm.cached_tokens == len(scheduler.index.tokens(memory).token_ids) == warm.injected_tokens
    after = slow.host_cache()
    assert after.hits == before.hits + 1 and after.waits == before.waits, "it was brought to host memory"
    assert [token.id for token in scheduler.stream(QUERY, [memory], NEW_TOKENS)] == list(cold.token_ids)
    assert scheduler.stats().hits == 2 and scheduler.stats().misses == 1
    assert "is in ram" in scheduler.explain(memory.id)
    scheduler.close()
    slow.reset()
    again = opened()
    assert again.answer(QUERY, [memory], NEW_TOKENS).injected_tokens == warm.injected_tokens
    assert again.builds == 0


def test_budgets_move_memories_between_the_tiers_and_out(slow: VLLMBackend, opened: Open) -> None:
    memories = texts(3)
    size = max(slow.fingerprint.kv_bytes(len(slow.template.memory_tokens(text).token_ids)) for text in TEXTS[:3])
    scheduler = opened({"gpu": size, "disk": size}, max_builds=3)
    expected = [as_text(slow, scheduler, [memory]) for memory in memories]
    for memory in memories:
        scheduler.observe(memory, QUERY)
        scheduler.tick()
    assert {id_: tier for id_, tier in scheduler.index.tiers().items()} == {"text 2": "gpu", "text 1": "disk"}
    assert slow.pins.pinned_ids() == [scheduler.index.stored()["text 2"][0]]
    engine_files = {path.name for path in slow.store.folder.glob("*.safetensors")}
    scheduler.observe(memories[1], QUERY)
    kinds = [(move.kind, move.memory_id, move.target) for move in scheduler.tick()]
    assert ("promote", "text 1", "gpu") in kinds and scheduler.index.tiers()["text 1"] == "gpu"
    assert len({path.name for path in slow.store.folder.glob("*.safetensors")} - engine_files) <= 1
    for memory, ids in zip(memories, expected, strict=True):
        answer = scheduler.answer(QUERY, [memory], NEW_TOKENS)
        assert answer.token_ids == ids[: len(answer.token_ids)]
    scheduler.pin("text 0")
    scheduler.tick()
    assert scheduler.index.tiers()["text 0"] == "gpu"
    assert scheduler.forget("text 0") and "text 0" not in scheduler.index.tiers()
    assert slow.pins.pinned_ids() == []


def test_an_edited_text_and_another_namespace_get_their_own(slow: VLLMBackend, opened: Open) -> None:
    scheduler, (memory,) = opened(), texts(1)
    scheduler.observe(memory, QUERY)
    scheduler.tick()
    edited = memory.model_copy(update={"memory": "Nothing can be returned. " + memory.memory})
    answer = scheduler.answer(QUERY, [edited], NEW_TOKENS)
    expected = as_text(slow, scheduler, [edited])
    assert answer.token_ids == expected[: len(answer.token_ids)] and answer.injected_tokens == 0
    assert scheduler.answer(QUERY, [memory], NEW_TOKENS, namespace="acme").cached_tokens == 0
    scheduler.tick()
    scheduler.tick()
    slow.reset()
    assert scheduler.answer(QUERY, [edited], NEW_TOKENS).injected_tokens > 0
    theirs = scheduler.answer(QUERY, [memory], NEW_TOKENS, namespace="acme")
    assert theirs.injected_tokens > 0, "built for that namespace"


def test_texts_used_together_are_joined_and_damage_is_answered_as_text(slow: VLLMBackend, opened: Open) -> None:
    scheduler, memories = opened(max_builds=4), texts(2)
    expected = as_text(slow, scheduler, memories)
    for _ in range(4):
        scheduler.answer(QUERY, memories, NEW_TOKENS)
        scheduler.tick()
    slow.reset()
    joined = scheduler.answer(QUERY, memories, NEW_TOKENS)
    assert joined.injected_tokens == len(scheduler.index.joint_tokens(memories).token_ids)
    assert joined.token_ids == expected[: len(joined.token_ids)]
    slow.reset()
    for path in scheduler.journal.folder.glob("kv/*.safetensors"):
        whole = bytearray(path.read_bytes())
        whole[-1000] ^= 1
        path.write_bytes(whole)
    answer = scheduler.answer(QUERY, memories, NEW_TOKENS)
    assert answer.token_ids == joined.token_ids and answer.injected_tokens == 0 and "could not be read" in answer.note


def test_a_build_runs_beside_the_answers_of_other_threads(slow: VLLMBackend) -> None:
    """By the order of events: an answer that begins during a build is whole before the build is."""
    slow.reset()
    events: list[str] = []
    started = threading.Event()
    long = " ".join(TEXTS)

    def build() -> None:
        slow.build(long[:4000], between_layers=started.set)
        events.append("built")

    thread = threading.Thread(target=build)
    thread.start()
    started.wait()
    expected = slow.generate(QUERY, None, 2)
    events.append("answered")
    thread.join()
    assert sorted(events) == ["answered", "built"]
    assert slow.generate(QUERY, None, 2, cache_salt="again").token_ids == expected.token_ids
    slow.reset()


def test_what_vllm_has_no_tier_for_is_refused(slow: VLLMBackend, opened: Open, tmp_path: Path) -> None:
    for budget in ({"disk_int8": 1 << 20}, {"cold": 1 << 20}):
        with pytest.raises(ConfigError, match="With vLLM the tiers are gpu, ram, disk"):
            opened(budget)
    with pytest.raises(ConfigError, match="in a folder"):
        MemScheduler(on_engine(slow), "lru", {"ram": 1 << 20}, costs=Costs(0.0, 0.0, 0.0, 1))
