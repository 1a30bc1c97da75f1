"""Memories load while the engine goes on: one read for many requests, a budget, and files that change under a load.

Reads are limited to a few MiB a second, so a load takes many of the engine's steps.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmem import KVCacheItem
from kvmem.engines.base import FileHandle
from kvmem.engines.vllm.backend import VLLMBackend
from kvmem.engines.vllm.requests import GenerationRequest, VLLMGeneration
from kvmem.errors import InjectionError
from kvmem.storage import ThreadReader
from tests.helpers.tiny import pairs
from tests.vllm.conftest import BUDGET_MIB, on_engine

TEXTS = [text for text, _ in pairs(6, 1600, seed=31)]
QUERY = "Which rule is the first?"
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def items(slow: VLLMBackend) -> list[KVCacheItem]:
    return on_engine(slow).extract(TEXTS)


@pytest.fixture(scope="module")
def expected(slow: VLLMBackend, items: list[KVCacheItem]) -> list[tuple[int, ...]]:
    """What each memory's prompt is answered when it is computed."""
    answers = []
    for item in items:
        prompt = slow.split(QUERY, slow.store.view(item))
        answers.append(slow.answer_prompt(type(prompt)((), prompt.ids), None, NEW_TOKENS).token_ids)
    assert len(set(answers)) == len(answers), "the answers tell the memories apart"
    slow.reset()
    return answers


@pytest.fixture
def views(slow: VLLMBackend, items: list[KVCacheItem], expected: list[tuple[int, ...]]) -> Iterator[list[FileHandle]]:
    """Files that are all new to the engine: each is written again. After a test they are restored."""
    slow.reset()
    handles = [slow.store.view(item) for item in items]
    whole = [handle.file.path.read_bytes() for handle in handles]
    renew(handles, whole)
    yield handles
    renew(handles, whole)


def renew(handles: list[FileHandle], whole: list[bytes]) -> None:
    for handle, content in zip(handles, whole, strict=True):
        handle.file.path.unlink(missing_ok=True)
        handle.file.path.write_bytes(content)


def asked(
    engine: VLLMBackend, handle: FileHandle | None, query: str = QUERY, salt: str | None = None
) -> VLLMGeneration:
    return engine.generate_batch([request(engine, handle, query, salt)])[0]


def request(
    engine: VLLMBackend,
    handle: FileHandle | None,
    query: str = QUERY,
    salt: str | None = None,
    tokens: int = NEW_TOKENS,
) -> GenerationRequest:
    return GenerationRequest(engine.split(query, handle), handle, tokens, cache_salt=salt, past_end=True)


@pytest.mark.parametrize("is_disk_slow", [False, True], ids=["limited reads", "slow file system"])
def test_a_slow_load_leaves_other_requests_their_steps_and_tokens(
    slow: VLLMBackend, views: list[FileHandle], monkeypatch: pytest.MonkeyPatch, is_disk_slow: bool
) -> None:
    """By the order of events: another request, which arrives later, has all its tokens before the first of the one
    whose file is read."""
    if is_disk_slow:  # each system call that reads a file, on threads of this process
        read = os.preadv
        monkeypatch.setattr(os, "preadv", lambda *arguments: (time.sleep(0.05), read(*arguments))[1])
        monkeypatch.setattr(slow.loop.connector.worker_side.files, "reader", ThreadReader())
    loading = request(slow, views[0])
    other = request(slow, None, "Tell me a story.", "story", 12)
    alone = slow.answer(other.query, other)
    slow.reset()
    first, second = (slow.engine_request(each.query, each) for each in (loading, other))
    events: list[str] = []
    slow.loop.add(first, stream=True)
    slow.loop.step()  # the load begins
    slow.loop.add(second, stream=True)
    token_ids: dict[str, list[int]] = {first.id: [], second.id: []}
    finished = 0
    while finished < 2:
        for output in slow.loop.step():
            events += [output.request_id] * len(output.outputs[0].token_ids)
            token_ids[output.request_id] += output.outputs[0].token_ids
            finished += output.finished
    assert events == [second.id] * 12 + [first.id] * NEW_TOKENS
    assert tuple(token_ids[second.id]) == alone.token_ids


def test_one_read_for_many_requests_and_none_from_host_memory(
    slow: VLLMBackend, views: list[FileHandle], expected: list[tuple[int, ...]]
) -> None:
    before = slow.host_cache()
    answers = slow.generate_batch([request(slow, views[1], salt=f"tenant {i}") for i in range(12)])
    after = slow.host_cache()
    assert [answer.token_ids for answer in answers] == [expected[1]] * 12
    assert all(answer.injected_tokens == len(views[1].tokens.token_ids) for answer in answers)
    assert (after.reads - before.reads, after.waits - before.waits, after.hits - before.hits) == (1, 12, 0)
    assert asked(slow, views[1], salt="one more").token_ids == expected[1]
    last = slow.host_cache()
    assert (last.reads - after.reads, last.waits - after.waits, last.hits - after.hits) == (0, 0, 1)


def test_host_memory_keeps_to_its_budget(
    slow: VLLMBackend, views: list[FileHandle], expected: list[tuple[int, ...]]
) -> None:
    """All files are asked for at once, and not all of them fit."""
    before = slow.host_cache()
    answers = slow.generate_batch([request(slow, handle, salt="budget") for handle in views])
    assert [answer.token_ids for answer in answers] == expected
    after = slow.host_cache()
    assert after.budget_bytes == BUDGET_MIB << 20
    assert 0 < after.used_bytes <= after.budget_bytes and 0 < after.files < len(views)
    assert after.reads - before.reads == len(views) and after.evictions > before.evictions


def test_prefetched_files_are_there_when_requests_come(
    slow: VLLMBackend, views: list[FileHandle], items: list[KVCacheItem], expected: list[tuple[int, ...]]
) -> None:
    before = slow.host_cache()
    assert slow.prefetch([items[2], views[3]]) == 2
    while slow.host_cache().reads < before.reads + 2:
        pass
    answers = slow.generate_batch([request(slow, handle, salt="ahead") for handle in views[2:4]])
    assert [answer.token_ids for answer in answers] == expected[2:4]
    after = slow.host_cache()
    assert (after.waits, after.hits) == (before.waits, before.hits + 2)
    views[2].file.path.unlink()
    with pytest.raises(InjectionError, match=r"not prefetched: .*can't be read"):
        slow.prefetch([items[2]])


def test_an_aborted_request_leaves_its_load_to_others(
    slow: VLLMBackend, views: list[FileHandle], expected: list[tuple[int, ...]]
) -> None:
    before = slow.host_cache()
    given_up = request(slow, views[4], salt="given up")
    first = slow.engine_request(given_up.query, given_up)
    slow.loop.add(first)
    slow.loop.step()
    slow.llm.llm_engine.abort_request([first.id])
    slow.reset()  # it holds no blocks
    assert asked(slow, views[4], salt="another").token_ids == expected[4]
    assert slow.host_cache().reads == before.reads + 1


def cut_off(path: Path, whole: bytes, other: bytes) -> None:
    os.truncate(path, len(whole) * 2 // 3)


def overwrite(path: Path, whole: bytes, other: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(len(whole) // 2)
        file.write(bytes(4096))


def delete(path: Path, whole: bytes, other: bytes) -> None:
    path.unlink()


def replace(path: Path, whole: bytes, other: bytes) -> None:
    beside = path.with_name(f".{path.name}")
    beside.write_bytes(other)
    beside.replace(path)


@pytest.mark.parametrize("damage", [cut_off, overwrite, delete, replace], ids=lambda damage: damage.__name__)
def test_files_that_change_under_their_loads_are_those_requests_errors(
    slow: VLLMBackend,
    views: list[FileHandle],
    expected: list[tuple[int, ...]],
    damage: Callable[[Path, bytes, bytes], None],
) -> None:
    """In the middle of a read, between reads, and before them; every other answer is right."""
    whole = [handle.file.path.read_bytes() for handle in views]
    started = threading.Event()

    def spoil() -> None:
        for number in range(4):
            damage(views[number].file.path, whole[number], whole[5])
            started.wait(0.1)  # the four reads take one second

    spoiling = threading.Thread(target=spoil)
    numbers = [i % 5 for i in range(50)]
    spoiling.start()
    answers = slow.generate_batch(
        [request(slow, views[n], salt=f"{damage.__name__} {i}") for i, n in enumerate(numbers)]
    )
    spoiling.join()
    for number, answer in zip(numbers, answers, strict=True):
        if isinstance(answer, InjectionError):
            assert number < 4, answer
        else:
            assert answer.token_ids == expected[number]
    assert any(isinstance(answer, InjectionError) for answer in answers)
    assert sum(isinstance(answer, VLLMGeneration) for answer in answers) >= 10

    renew(views, whole)
    assert [asked(slow, handle, salt="restored").token_ids for handle in views] == expected
