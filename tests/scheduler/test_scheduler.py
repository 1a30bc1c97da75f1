"""MemScheduler on a tiny model: what is hot is built, what changed is never served, what fails stays text."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvmem import TextualMemoryItem
from kvmem.engines.generation import Sampling
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import ArgumentError, ClosedError, KVMemWarning, UnknownMemoryError
from kvmem.prompt.template import TokenizedPrompt
from kvmem.scheduler.cost_model import Costs, kv_bytes_a_token
from kvmem.scheduler.scheduler import MemScheduler
from tests.helpers.tiny import memory_on, pairs

ROOT = Path(__file__).parents[2]
QUERY = "What is the first rule?"
MEMORIES = [TextualMemoryItem(id=f"m{i}", memory=memory) for i, (memory, _) in enumerate(pairs(6, 400))]


def scheduler_on(backend: HFBackend, folder: Path | None = None, ram: int = 1 << 30, **fields: object) -> MemScheduler:
    """A scheduler whose prices are fixed, so that its decisions do not depend on this machine's load."""
    costs = Costs(0.001, 1e-4, 0.0, kv_bytes_a_token(backend))
    budget = {"ram": ram} if folder is None else {"ram": ram, "disk": 1 << 30}
    return MemScheduler(memory_on(backend), "benefit_per_byte", budget, folder, costs, **fields)  # type: ignore[arg-type]


def use(scheduler: MemScheduler, memory: TextualMemoryItem, times: int) -> None:
    for _ in range(times):
        scheduler.observe(memory, QUERY)


def as_text(backend: HFBackend, memory: TextualMemoryItem, tokens: int = 8) -> tuple[int, ...]:
    """Greedy tokens of the same prompt with nothing cached."""
    prompt = backend.template.split(backend.template.memory_tokens(memory.memory), QUERY)
    return tuple(backend.decode(TokenizedPrompt((), prompt.ids), None, tokens, Sampling()))


def test_hot_text_is_promoted_and_its_answer_unchanged(qwen3: HFBackend) -> None:
    scheduler = scheduler_on(qwen3, admit_misses=False)
    before = scheduler.answer(QUERY, [MEMORIES[0]], 8)
    assert before.cached_tokens == 0 and before.token_ids == as_text(qwen3, MEMORIES[0])
    assert scheduler.tick() == []  # one use does not pay for a build
    use(scheduler, MEMORIES[0], 3)
    assert [move.kind for move in scheduler.tick()] == ["build"]
    after = scheduler.answer(QUERY, [MEMORIES[0]], 8)
    assert after.cached_tokens > 50 and after.prompt_tokens == before.prompt_tokens
    assert after.token_ids == before.token_ids
    assert "is in ram. rank 1 of 1: " in scheduler.explain("m0") and "built" in scheduler.explain("m0")


def test_several_memories_share_the_longest_stored_prefix(qwen3: HFBackend) -> None:
    scheduler = scheduler_on(qwen3)
    text = scheduler.answer(QUERY, MEMORIES[:2], 8)
    use(scheduler, MEMORIES[0], 3)
    scheduler.tick()
    injected = scheduler.answer(QUERY, MEMORIES[:2], 8)
    assert text.cached_tokens == 0 < injected.cached_tokens < injected.prompt_tokens
    assert injected.token_ids == text.token_ids and injected.prompt_tokens == text.prompt_tokens


def test_edited_text_is_never_served_from_old_kv(qwen3: HFBackend) -> None:
    scheduler = scheduler_on(qwen3)
    use(scheduler, MEMORIES[0], 6)
    scheduler.tick()
    edited = TextualMemoryItem(id="m0", memory="No: " + MEMORIES[0].memory[::-1])
    scheduler.update(edited)
    assert scheduler.index.tiers() == {} and scheduler.items.used_bytes()["ram"] == 0
    answer = scheduler.answer(QUERY, [edited], 8)
    assert answer.cached_tokens == 0 and answer.token_ids == as_text(qwen3, edited)
    scheduler.tick()  # still hot: built again, from the new text
    again = scheduler.answer(QUERY, [edited], 8)
    assert again.cached_tokens > 50 and again.token_ids == answer.token_ids


def test_changed_text_without_update_is_an_edit(qwen3: HFBackend) -> None:
    scheduler = scheduler_on(qwen3)
    use(scheduler, MEMORIES[0], 6)
    scheduler.tick()
    edited = TextualMemoryItem(id="m0", memory=MEMORIES[1].memory)
    answer = scheduler.answer(QUERY, [edited], 8)
    assert answer.cached_tokens == 0 and answer.token_ids == as_text(qwen3, edited)
    assert scheduler.builds == scheduler.admissions == 1, "what is stored now is what this answer computed"
    again = scheduler.answer(QUERY, [edited], 8)
    assert again.cached_tokens > 50 and again.token_ids == answer.token_ids


def test_a_text_edited_within_its_reuse_time_is_not_promoted(qwen3: HFBackend) -> None:
    scheduler = scheduler_on(qwen3)
    for round_ in range(12):
        scheduler.observe(TextualMemoryItem(id="m0", memory=f"{MEMORIES[0].memory} {round_}"), QUERY)
        assert scheduler.tick() == []
    assert "is text. not worth its bytes" in scheduler.explain("m0") and "11 edits" in scheduler.explain("m0")


def test_an_edit_during_a_build_cancels_it(qwen3: HFBackend) -> None:
    """The build waits for a running request; meanwhile its text changes."""
    scheduler = scheduler_on(qwen3)
    use(scheduler, MEMORIES[0], 6)
    edited = TextualMemoryItem(id="m0", memory=MEMORIES[1].memory)
    moves: list[object] = []
    with scheduler.gate.request():
        ticking = threading.Thread(target=lambda: moves.extend(scheduler.tick()))
        ticking.start()
        while not scheduler.gate.layers_waited:
            ticking.join(0.001)
        scheduler.update(edited)
        ticking.join(10)
        assert not ticking.is_alive()  # cancelled while the request still runs
    assert moves == [] and scheduler.cancelled_builds == 1 and scheduler.builds == 0
    assert scheduler.items.ids() == [] and scheduler.failures == {}
    scheduler.tick()
    answer = scheduler.answer(QUERY, [edited], 8)
    assert answer.cached_tokens > 50 and answer.token_ids == as_text(qwen3, edited)


def test_a_build_waits_for_a_request(qwen3: HFBackend) -> None:
    scheduler = scheduler_on(qwen3)
    use(scheduler, MEMORIES[0], 6)
    with scheduler.gate.request():
        ticking = threading.Thread(target=scheduler.tick)
        ticking.start()
        while not scheduler.gate.layers_waited:
            ticking.join(0.001)
        ticking.join(0.2)
        assert ticking.is_alive() and scheduler.builds == 0
        scheduler.backend.generate(QUERY, None, 2)  # the request's own forward passes are not stopped
    ticking.join(10)
    assert not ticking.is_alive() and scheduler.builds == 1


def test_a_failed_build_leaves_the_memory_as_text(qwen3: HFBackend) -> None:
    """A text longer than the model's positions can't be built; the others are as they were."""
    scheduler = scheduler_on(qwen3)
    use(scheduler, MEMORIES[1], 6)
    scheduler.tick()
    positions = qwen3.model_config.max_position_embeddings
    too_long = TextualMemoryItem(id="long", memory="word " * (positions + 10))
    use(scheduler, too_long, 20)
    assert scheduler.tick() == []
    failure = scheduler.failures["long"]
    assert failure.count == 1 and "PromptError" in failure.reason and str(positions) in failure.reason
    assert scheduler.index.tiers() == {"m1": "ram"} and "failed 1 times" in scheduler.explain("long")
    scheduler.tick()
    assert scheduler.failures["long"].count == 1  # not tried again at once
    use(scheduler, too_long, 20)
    scheduler.tick()
    assert scheduler.failures["long"].count == 2
    scheduler.update(TextualMemoryItem(id="long", memory=MEMORIES[2].memory))
    use(scheduler, TextualMemoryItem(id="long", memory=MEMORIES[2].memory), 40)
    assert [move.memory_id for move in scheduler.tick()] == ["long"] and scheduler.failures == {}


def test_the_budget_is_kept_and_the_more_useful_memory_stays(qwen3: HFBackend) -> None:
    longest = max(len(qwen3.template.memory_tokens(memory.memory).token_ids) for memory in MEMORIES)
    size = longest * kv_bytes_a_token(qwen3)
    scheduler = scheduler_on(qwen3, ram=2 * size)
    for _ in range(10):
        for i, memory in enumerate(MEMORIES):
            use(scheduler, memory, 2**i)
        scheduler.tick()
        assert scheduler.items.used_bytes()["ram"] <= 2 * size
    assert "m5" in scheduler.index.tiers()
    with pytest.raises(UnknownMemoryError, match="Never observed: x"):
        scheduler.explain("x")


def test_state_survives_a_restart(qwen3: HFBackend, tmp_path: Path) -> None:
    scheduler = scheduler_on(qwen3, tmp_path, ram=0)  # all on disk
    use(scheduler, MEMORIES[0], 5)
    use(scheduler, MEMORIES[1], 4)
    scheduler.tick()
    scheduler.tick()
    assert scheduler.index.tiers() == {"m0": "disk", "m1": "disk"}
    before = scheduler.planner.state()
    scheduler.close()
    again = scheduler_on(qwen3, tmp_path, ram=0)
    assert again.planner.state() == before and again.index.tiers() == {"m0": "disk", "m1": "disk"}
    answer = again.answer(QUERY, [MEMORIES[0]], 8)
    assert answer.cached_tokens > 50 and answer.token_ids == as_text(qwen3, MEMORIES[0])
    again.close()


KILLED_IN_A_BUILD = """
import os, signal, sys
from pathlib import Path
from tests.helpers.tiny import tiny_backend
from tests.scheduler.test_scheduler import MEMORIES, scheduler_on, use
backend = tiny_backend("qwen3")
scheduler = scheduler_on(backend, Path(sys.argv[1]), ram=0)
use(scheduler, MEMORIES[0], 5)
scheduler.tick()
use(scheduler, MEMORIES[1], 9)
second_layer = backend.model.get_decoder().layers[1]
second_layer.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
scheduler.tick()
"""


def test_kill_in_a_build_loses_nothing(qwen3: HFBackend, tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", KILLED_IN_A_BUILD, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert child.returncode == -signal.SIGKILL
    scheduler = scheduler_on(qwen3, tmp_path, ram=0)
    table = scheduler.planner.table
    assert {memory_id: table.uses[row] for memory_id, row in table.row_of.items()} == {"m0": 5, "m1": 9}
    assert scheduler.index.tiers() == {"m0": "disk"} and scheduler.items.refused == {}
    scheduler.tick()
    assert scheduler.index.tiers() == {"m0": "disk", "m1": "disk"}
    scheduler.close()


def test_damaged_kv_is_answered_as_text(qwen3: HFBackend, tmp_path: Path) -> None:
    scheduler = scheduler_on(qwen3, tmp_path, ram=0, admit_misses=False)
    use(scheduler, MEMORIES[0], 5)
    scheduler.tick()
    (path,) = (tmp_path / "kv").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    answer = scheduler.answer(QUERY, [MEMORIES[0]], 8)
    assert answer.cached_tokens == 0 and answer.token_ids == as_text(qwen3, MEMORIES[0])
    assert "checksum" in scheduler.prefix_selector.unreadable["m0"] and scheduler.index.tiers() == {}
    scheduler.close()


def test_in_the_background_answers_and_edits_stay_right(qwen3: HFBackend, tmp_path: Path) -> None:
    """4 threads query and edit while the scheduler's thread builds, moves and evicts; every answer is its text's."""
    texts = {f"m{i}": [TextualMemoryItem(id=f"m{i}", memory=MEMORIES[j].memory) for j in (i, i + 3)] for i in range(3)}
    right = {memory.memory: as_text(qwen3, memory, 4) for memories in texts.values() for memory in memories}
    size = max(len(qwen3.template.memory_tokens(text).token_ids) for text in right) * kv_bytes_a_token(qwen3)
    scheduler = scheduler_on(qwen3, tmp_path, ram=size)
    scheduler.start()
    wrong: list[str] = []
    cached: list[int] = []

    def ask(seed: int) -> None:
        for step in range(25):
            memory = texts[f"m{(seed + step) % 3}"][step // 20]
            answer = scheduler.answer(QUERY, [memory], 4)
            cached.append(answer.cached_tokens)
            if answer.token_ids != right[memory.memory]:
                wrong.append(memory.id)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    scheduler.close()
    assert not wrong and any(cached) and scheduler.planner.table.now == 100


def test_a_load_slower_than_prefilling_is_skipped(qwen3: HFBackend, tmp_path: Path) -> None:
    """The same memory on a disk that is declared slow, then fast; the answer is the same."""
    served = {}
    for name, load_s_a_byte in (("slow", 1.0), ("fast", 1e-12)):
        costs = Costs(0.001, 1e-4, 0.0, kv_bytes_a_token(qwen3), {"disk": load_s_a_byte})
        budget = {"disk": 1 << 30}
        scheduler = MemScheduler(memory_on(qwen3), "benefit_per_byte", budget, tmp_path / name, costs)
        use(scheduler, MEMORIES[0], 6)
        assert [move.target for move in scheduler.tick()] == ["disk"]
        served[name] = scheduler.answer(QUERY, [MEMORIES[0]], 8)
        assert scheduler.prefix_selector.not_worth_loading == (name == "slow")
        scheduler.close()
    assert served["slow"].cached_tokens == 0 < served["fast"].cached_tokens
    assert served["slow"].token_ids == served["fast"].token_ids


def test_the_error_for_a_text_without_an_id_names_the_type(qwen3: HFBackend) -> None:
    scheduler = scheduler_on(qwen3)
    for given in ["a plain text"], "a plain text":
        with pytest.raises(ArgumentError, match=r"not str. Give TextualMemoryItem\(id="):
            scheduler.answer(QUERY, given)  # type: ignore[arg-type]
    assert scheduler.tick() == []


def test_closing_twice_is_closing_once(qwen3: HFBackend, tmp_path: Path) -> None:
    scheduler = scheduler_on(qwen3, tmp_path)
    use(scheduler, MEMORIES[0], 3)
    scheduler.close()
    scheduler.close()


def test_a_with_block_closes_and_starts_nothing(qwen3: HFBackend, tmp_path: Path) -> None:
    with scheduler_on(qwen3, tmp_path) as scheduler:
        assert not scheduler.is_ticking, "tick or start is the user's choice"
        scheduler.start(60.0)
        scheduler.observe(MEMORIES[0], QUERY)
        assert scheduler.is_ticking
    assert not scheduler.is_ticking
    with pytest.raises(ClosedError):
        scheduler.observe(MEMORIES[0], QUERY)
    with pytest.raises(ClosedError), scheduler:
        raise AssertionError("a closed scheduler is not entered")
    with pytest.raises(ZeroDivisionError), scheduler_on(qwen3, tmp_path) as again:
        assert again.index.texts["m0"].memory == MEMORIES[0].memory, "its state was written"
        again.update(MEMORIES[1])
        raise ZeroDivisionError
    scheduler_on(qwen3, tmp_path).close()  # the folder was unlocked


def test_a_state_that_can_not_be_written_locks_no_folder(qwen3: HFBackend, tmp_path: Path) -> None:
    """Closing warns of the state's error and still releases the lock of the disk tier."""
    state = tmp_path / "state.json"
    with pytest.warns(KVMemWarning, match=r"not written at close: .*state\.json"), scheduler_on(qwen3, tmp_path):
        state.unlink(missing_ok=True)
        state.mkdir()
    state.rmdir()
    scheduler_on(qwen3, tmp_path).close()
