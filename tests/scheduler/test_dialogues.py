"""Conversations as memories: the KV of the earlier turns begins the next prompt, or the note says why it does not."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from kvmem import DialogueMemoryItem, TextualMemoryItem
from kvmem.cache import Message
from kvmem.engines.generation import Sampling
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import ArgumentError, PromptError
from kvmem.models.loading import Loaded
from kvmem.prompt.template import TokenizedPrompt
from kvmem.scheduler.cost_model import Costs, kv_bytes_a_token
from kvmem.scheduler.scheduler import MemScheduler
from tests.helpers.architectures import tiny_architecture
from tests.helpers.tiny import memory_on
from tests.scheduler.test_scheduler import MEMORIES, QUERY

SYSTEM = MEMORIES[0].memory
QUESTIONS = ("What is the first rule?", "And the second?", "Why?", "Is that all?")


def opened(backend: HFBackend, folder: Path | None = None, admit_misses: bool = True) -> MemScheduler:
    costs = Costs(0.001, 1e-4, 0.0, kv_bytes_a_token(backend), {}, backend.fingerprint.kv_bytes(0))
    budget = {"ram": 1 << 30} if folder is None else {"ram": 1 << 30, "disk": 1 << 30}
    return MemScheduler(memory_on(backend), "lfu", budget, folder, costs, admit_misses=admit_misses)


@pytest.fixture(params=["qwen3", "sliding", "states"])
def engine(request: pytest.FixtureRequest) -> HFBackend:
    if request.param == "states":
        return tiny_architecture("qwen3_next")
    backend = request.getfixturevalue(request.param)
    assert isinstance(backend, HFBackend)
    return backend


def as_text(backend: HFBackend, turns: tuple[Message, ...], query: str, tokens: int = 6) -> tuple[int, ...]:
    """Greedy tokens of the conversation's whole prompt with nothing cached."""
    if not turns:
        prompt = backend.template.bare(query)
    else:
        prompt = backend.template.split(backend.template.memory_tokens(turns), query)
    return tuple(backend.decode(TokenizedPrompt((), prompt.ids), None, tokens, Sampling()))


def held_by(backend: HFBackend, turns: tuple[Message, ...]) -> int:
    return len(backend.template.memory_tokens(turns).token_ids)


def test_each_turn_reuses_what_the_turn_before_it_computed(engine: HFBackend, tmp_path: Path) -> None:
    """The turns before the last answer are not computed again, in the next process neither."""
    turns: tuple[Message, ...] = ({"role": "system", "content": SYSTEM},)
    held = 0
    scheduler = opened(engine, tmp_path)
    for i, question in enumerate(QUESTIONS):
        if i == len(QUESTIONS) - 1:
            scheduler.close()
            scheduler = opened(engine, tmp_path)
        answer = scheduler.chat("talk", question, 6, system=SYSTEM)
        assert answer.token_ids == as_text(engine, turns, question) and answer.note == ""
        assert answer.cached_tokens == held
        held = held_by(engine, turns)
        turns = (*turns, {"role": "user", "content": question}, {"role": "assistant", "content": answer.text})
    assert scheduler.index.texts["talk"].memory == turns and scheduler.builds == 0
    assert len(scheduler.items.ids()) == 1 and scheduler.planner.table.edits.sum() == 0
    scheduler.close()


def test_a_dialogue_without_a_system_turn_and_one_that_a_client_keeps(qwen3: HFBackend) -> None:
    scheduler = opened(qwen3)
    turns: tuple[Message, ...] = ()
    for question in QUESTIONS[:3]:
        answer = scheduler.chat("talk", question, 6)
        assert answer.token_ids == as_text(qwen3, turns, question)
        if turns:  # the same conversation, sent whole by its client
            kept = scheduler.answer(question, DialogueMemoryItem(id="sent", memory=turns), 6)
            assert kept.token_ids == answer.token_ids
        turns = (*turns, {"role": "user", "content": question}, {"role": "assistant", "content": answer.text})
    assert answer.cached_tokens == kept.cached_tokens == held_by(qwen3, turns[:2])


def test_the_kv_of_a_text_memory_serves_a_dialogue_that_begins_with_it(qwen3: HFBackend) -> None:
    scheduler = opened(qwen3)
    scheduler.answer(QUERY, MEMORIES[0], 1)
    scheduler.answer(QUERY, MEMORIES[0], 1, namespace="other")
    right = as_text(qwen3, ({"role": "system", "content": SYSTEM},), QUERY)
    answer = scheduler.chat("talk", QUERY, 6, system=SYSTEM)
    assert answer.token_ids == right and answer.cached_tokens == len(scheduler.index.tokens(MEMORIES[0]).token_ids)
    elsewhere = scheduler.chat("talk", QUERY, 6, system=SYSTEM, namespace="third")
    assert elsewhere.token_ids == right and elsewhere.cached_tokens == 0


def test_a_template_that_rewrites_earlier_turns_is_told(qwen3: HFBackend) -> None:
    tokenizer = copy.deepcopy(qwen3.tokenizer)
    tokenizer.chat_template = "{{ messages | length }} messages" + tokenizer.chat_template
    backend = HFBackend(Loaded(qwen3.model, tokenizer, qwen3.fingerprint.origin))
    scheduler = opened(backend)
    turns: tuple[Message, ...] = ({"role": "system", "content": SYSTEM},)
    for i, question in enumerate(QUESTIONS[:3]):
        answer = scheduler.chat("talk", question, 6, system=SYSTEM)
        assert answer.token_ids == as_text(backend, turns, question)
        assert answer.cached_tokens < 3
        told = "The chat template does not repeat the earlier turns of talk as they were: the prompt begins with"
        assert answer.note.startswith(told) == (i > 0)
        turns = (*turns, {"role": "user", "content": question}, {"role": "assistant", "content": answer.text})


def test_an_edited_or_forgotten_dialogue(qwen3: HFBackend, tmp_path: Path) -> None:
    with opened(qwen3, tmp_path) as scheduler:
        for question in QUESTIONS[:3]:
            scheduler.chat("talk", question, 6, system=SYSTEM)
        turns = scheduler.index.texts["talk"].memory
        edited = (turns[0], {"role": "user", "content": "Something else?"}, *turns[2:])
        answer = scheduler.answer(QUERY, DialogueMemoryItem(id="talk", memory=edited), 6)
        assert answer.token_ids == as_text(qwen3, edited, QUERY)  # type: ignore[arg-type]
        assert scheduler.index.texts["talk"].memory == edited
        earlier = scheduler.answer(QUERY, DialogueMemoryItem(id="talk", memory=edited[:1]), 6)
        assert earlier.token_ids == as_text(qwen3, edited[:1], QUERY) and earlier.cached_tokens > 50
        assert scheduler.index.texts["talk"].memory == edited, "earlier turns of a dialogue are no new text"
        assert scheduler.forget("talk")
        left = [path for path in tmp_path.rglob("*") if path.is_file() and b"Something else?" in path.read_bytes()]
        assert left == [] and scheduler.items.ids() == []


def test_what_is_no_dialogue_is_refused(qwen3: HFBackend, qwen3_plain: HFBackend) -> None:
    turn = {"role": "user", "content": "Hi"}
    for memory in ([], ["Hi"], [{"role": "user"}], [turn | {"name": "x"}], [turn | {"content": "\ud800"}], "Hi"):
        with pytest.raises(ArgumentError, match="DialogueMemoryItem"):
            DialogueMemoryItem(id="talk", memory=memory)  # type: ignore[arg-type]
    scheduler = opened(qwen3)
    dialogue = DialogueMemoryItem(id="talk", memory=(turn,))
    with pytest.raises(ArgumentError, match="whole memory of a prompt"):
        scheduler.answer(QUERY, [MEMORIES[0], dialogue])
    scheduler.observe(MEMORIES[0], QUERY)
    with pytest.raises(ArgumentError, match="m0 is a text memory"):
        scheduler.chat("m0", QUERY)
    with pytest.raises(PromptError, match="The query is empty"):
        scheduler.chat("talk", "")
    with pytest.raises(PromptError, match="need a chat template"):
        opened(qwen3_plain).answer(QUERY, dialogue)
    assert [info.id for info in scheduler.list()] == ["m0"]
    copied = dialogue.checked()
    assert copied == dialogue and copied.memory == (turn,) and isinstance(copied, TextualMemoryItem)
