"""Forgetting: a search of the bytes of all files finds nothing of a text that was forgotten or replaced."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kvmem import MemScheduler, TextualMemoryItem
from kvmem.engines.huggingface import HFBackend
from kvmem.errors import KVMemWarning, StorageError, UnknownMemoryError
from kvmem.scheduler import Costs
from kvmem.scheduler.cost_model import kv_bytes_a_token
from kvmem.tiers import DiskStore
from tests.faults.test_scheduler_state import full_disk
from tests.helpers.tiny import loaded, memory_on
from tests.scheduler.test_scheduler import MEMORIES, QUERY, ROOT, as_text, use
from tests.tiers.conftest import FailingLink

SECRET = TextualMemoryItem(
    id="secret-id",
    memory="The access code of the vault is xylophone-4711, and nobody else may know it. " * 3,
    metadata={"owner": "quagmire-metadata"},
)
WORDS = (b"xylophone", b"code of the vault", b"quagmire", b"secret-id")
PUBLIC = MEMORIES[0]
TIERS = {"ram": 1 << 30, "disk": 1 << 30, "cold": 1 << 30}


@pytest.fixture
def link() -> Iterator[None]:
    """The remote store is up, before and after the test."""
    FailingLink.down, FailingLink.error = False, ConnectionError
    yield
    FailingLink.down = False


def open_on(backend: HFBackend, folder: Path, *tiers: str, **fields: object) -> MemScheduler:
    costs = Costs(0.001, 1e-3, 0.0, kv_bytes_a_token(backend), {"disk": 1e-12, "cold": 1e-12})
    budget = {tier: TIERS[tier] for tier in tiers}
    cold = f"failinglink://{folder}/cold" if "cold" in tiers else None
    return MemScheduler(memory_on(backend), "lfu", budget, folder / "state", costs, max_builds=9, cold=cold, **fields)  # type: ignore[arg-type]


def found(folder: Path, *words: bytes) -> dict[str, bytes]:
    """Which of the words is in which file's bytes or name, anywhere below the folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return {
        str(path): word for path in files for word in words or WORDS if word in path.read_bytes() + path.name.encode()
    }


def killed(scheduler: MemScheduler) -> None:
    """Leaves the folders as they are, as a process that was killed."""
    assert scheduler.journal is not None
    scheduler.items.close()
    scheduler.journal.close()


def known(backend: HFBackend, folder: Path, *tiers: str) -> MemScheduler:
    """A scheduler with KV of a secret memory, a public one and both groups of them."""
    scheduler = open_on(backend, folder, *tiers)
    for _ in range(5):
        scheduler.observe([SECRET, PUBLIC], QUERY)
        scheduler.observe([PUBLIC, SECRET], QUERY)
    use(scheduler, SECRET, 4)
    use(scheduler, PUBLIC, 5)
    for _ in range(3):
        scheduler.tick()
    ids = {"secret-id", "m0", '["secret-id", "m0"]', '["m0", "secret-id"]'}
    assert scheduler.index.tiers() == dict.fromkeys(ids, tiers[0]) and found(folder)
    return scheduler


def nothing_known(scheduler: MemScheduler, folder: Path) -> None:
    assert found(folder) == {}
    everything = json.dumps([scheduler.planner.state(), scheduler.failures.state(), scheduler.index.groups.state()])
    assert "secret-id" not in everything and "secret-id" not in str([scheduler.index.texts, scheduler.index.stored()])
    assert scheduler.index.tiers().keys() <= {"m0"} and scheduler.planner.heads == {}
    assert len(scheduler.items.ids()) == len(scheduler.index.tiers())
    with pytest.raises(UnknownMemoryError, match="Never observed: secret-id"):
        scheduler.explain("secret-id")


@pytest.mark.parametrize("tier", TIERS)
def test_nothing_is_left_of_a_forgotten_memory(qwen3: HFBackend, tmp_path: Path, link: None, tier: str) -> None:
    scheduler = known(qwen3, tmp_path, tier)
    public = scheduler.planner.table
    before = public.uses[public.row_of["m0"]], scheduler.items.nbytes(scheduler.index.stored()["m0"][0])
    assert scheduler.forget("secret-id") is True
    nothing_known(scheduler, tmp_path)
    assert scheduler.forget("secret-id") is False, "it is not known any more"
    table = scheduler.planner.table
    assert (table.uses[table.row_of["m0"]], scheduler.items.used_bytes()[tier]) == before
    assert scheduler.answer(QUERY, [PUBLIC], 8).cached_tokens > 50
    scheduler.tick()
    assert found(tmp_path) == {}
    killed(scheduler)
    with open_on(qwen3, tmp_path, tier) as again:
        assert list(again.index.texts) == ["m0"] and list(again.planner.table.ids) == ["m0"]
        use(again, SECRET, 5)
        again.tick()
        assert again.index.tiers()["secret-id"] == tier, "it may come back as a new memory"
        answer = again.answer(QUERY, [SECRET], 8)
        assert answer.cached_tokens > 20 and answer.token_ids == as_text(qwen3, SECRET)


@pytest.mark.parametrize("policy", ["benefit_per_byte", "lfu", "lru", "tinylfu", "memos_topk"])
def test_the_other_memories_of_any_policy_keep_their_counts(qwen3: HFBackend, tmp_path: Path, policy: str) -> None:
    costs = Costs(0.001, 1e-3, 0.0, kv_bytes_a_token(qwen3))
    with MemScheduler(memory_on(qwen3), policy, {"ram": 1 << 30}, tmp_path, costs) as scheduler:
        for memory, times in ((MEMORIES[0], 40), (SECRET, 30), (MEMORIES[1], 35), (MEMORIES[2], 3)):
            use(scheduler, memory, times)
        scheduler.tick()
        table = scheduler.planner.table
        before = {id_: table.uses[row] for id_, row in table.row_of.items()} | {"secret-id": 0}
        del before["secret-id"]
        scheduler.forget("secret-id")
        assert {id_: table.uses[row] for id_, row in table.row_of.items()} == before
        assert found(tmp_path) == {} and (table.totals >= 0).all()
        assert all(abs(table.weights()[0].sum(axis=0) - table.totals) < 1e-6)
        use(scheduler, MEMORIES[2], 60)
        for _ in range(4):
            scheduler.tick()
        assert "m2" in scheduler.index.tiers() and scheduler.explain("m2")


@pytest.mark.parametrize("tier", TIERS)
def test_nothing_is_left_of_a_replaced_text(qwen3: HFBackend, tmp_path: Path, link: None, tier: str) -> None:
    new = TextualMemoryItem(id="secret-id", memory=MEMORIES[1].memory)
    for way in ("update", "answer", "observe"):
        folder = tmp_path / way
        folder.mkdir()
        with closing(known(qwen3, folder, tier)) as scheduler:
            if way == "update":
                scheduler.update(new)
            else:
                scheduler.answer(QUERY, [new], 2) if way == "answer" else scheduler.observe(new, QUERY)
                scheduler.tick()
            assert found(folder, *WORDS[:3]) == {}
            assert scheduler.answer(QUERY, [new], 8).token_ids == as_text(qwen3, new)


def test_several_texts_are_replaced_by_one_write(qwen3: HFBackend, tmp_path: Path) -> None:
    with closing(known(qwen3, tmp_path, "disk")) as scheduler:
        before = json.loads((tmp_path / "state" / "state.json").read_bytes())["number"]
        scheduler.update([TextualMemoryItem(id=m.id, memory=MEMORIES[3].memory) for m in (SECRET, PUBLIC)])
        assert json.loads((tmp_path / "state" / "state.json").read_bytes())["number"] == before + 1
        assert found(tmp_path, *WORDS[:3], PUBLIC.memory[:20].encode()) == {}


@pytest.mark.parametrize("tier", TIERS)
def test_an_answer_that_uses_the_memory_finishes_and_brings_nothing_back(
    qwen3: HFBackend, tmp_path: Path, link: None, tier: str
) -> None:
    """The memory is forgotten between two layers of the answer's forward pass."""
    with closing(known(qwen3, tmp_path, tier)) as scheduler:
        right = as_text(qwen3, SECRET)
        forgotten: list[bool] = []

        def forget(*_: object) -> None:
            if not forgotten:
                forgotten.append(scheduler.forget("secret-id"))
                assert found(tmp_path) == {}

        hook = qwen3.model.get_decoder().layers[1].register_forward_pre_hook(forget)
        answer = scheduler.answer(QUERY, [SECRET], 8)
        hook.remove()
        assert forgotten == [True] and answer.cached_tokens > 20 and answer.token_ids == right
        nothing_known(scheduler, tmp_path)
        scheduler.tick()
        assert found(tmp_path) == {} and scheduler.items.used_bytes()[tier] > 0


@pytest.mark.parametrize("end", ["forget", "update"])
def test_a_build_that_runs_is_cancelled(qwen3: HFBackend, tmp_path: Path, end: str) -> None:
    """Another thread forgets or edits the memory while its KV is built, and while a request keeps the build waiting."""
    new = TextualMemoryItem(id="secret-id", memory=MEMORIES[1].memory)
    with open_on(qwen3, tmp_path, "disk") as scheduler:
        use(scheduler, SECRET, 6)
        ticking = threading.Thread(target=scheduler.tick)
        with scheduler.view([MEMORIES[2]]):
            ticking.start()
            while not scheduler.gate.layers_waited:
                pass
            scheduler.forget("secret-id") if end == "forget" else scheduler.update(new)
            assert found(tmp_path, *WORDS[: 4 if end == "forget" else 3]) == {}
        ticking.join()
        assert found(tmp_path, *WORDS[: 4 if end == "forget" else 3]) == {}
        assert (scheduler.builds, scheduler.cancelled_builds) == (0, 1)
        assert scheduler.index.tiers() == {} and not scheduler.failures


def test_forgetting_beside_answers_builds_and_edits(qwen3: HFBackend, tmp_path: Path) -> None:
    """Whatever runs beside it, nothing is left of a memory that is forgotten last."""
    with open_on(qwen3, tmp_path, "disk") as scheduler:
        scheduler.start(0.001)
        errors: list[Exception] = []
        right = {memory.id: as_text(qwen3, memory, 2) for memory in (SECRET, PUBLIC)}

        def ask(memories: list[TextualMemoryItem]) -> None:
            try:
                for _ in range(25):
                    answer = scheduler.answer(QUERY, memories, 2)
                    if len(memories) == 1:
                        assert answer.token_ids == right[memories[0].id]
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=ask, args=(m,)) for m in ([SECRET], [PUBLIC], [SECRET, PUBLIC])]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            scheduler.forget("secret-id")
        assert not errors and scheduler.is_ticking and not scheduler.failed_ticks
        scheduler.forget("secret-id")
        nothing_known(scheduler, tmp_path)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "its head": lambda content: content[:60] + b"x" + content[61:],
    "its end": lambda content: content[:-100],
    "its tensors": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "its manifest": lambda content: content.replace(b"kv_cache_id", b"kv_cache_ix", 1),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_files_that_can_not_be_used_are_forgotten_too(qwen3: HFBackend, tmp_path: Path, name: str) -> None:
    with closing(known(qwen3, tmp_path, "disk")) as scheduler:
        kept = DiskStore.file_of(tmp_path / "state" / "kv", scheduler.index.stored()["m0"][0])
    foreign = tmp_path / "state" / "kv" / "notes.safetensors"
    foreign.write_bytes(b"a file of another program")
    for path in (tmp_path / "state" / "kv").glob("*.safetensors"):
        if path not in (kept, foreign):
            path.write_bytes(DAMAGE[name](path.read_bytes()))
    with open_on(qwen3, tmp_path, "disk") as again:
        assert len(again.items.refused) == 4 and found(tmp_path / "state" / "kv")
        again.forget("secret-id")
        nothing_known(again, tmp_path)
        assert list(again.items.refused) == [foreign.name] and kept.exists() and foreign.exists()


def test_files_of_another_model_are_forgotten_by_what_they_state(qwen3: HFBackend, tmp_path: Path, link: None) -> None:
    other = HFBackend(loaded("tiny", seed=1))
    for tier in ("disk", "cold"):
        folder = tmp_path / tier
        folder.mkdir()
        known(other, folder, tier).close()
        with open_on(qwen3, folder, tier) as scheduler:
            assert len(scheduler.items.refused) == 4
            scheduler.forget("secret-id")
            nothing_known(scheduler, folder)
            assert len(scheduler.items.refused) == 1, "the public memory's"
        with open_on(other, folder, tier) as back:
            assert back.index.tiers() == {"m0": tier}


def test_what_was_set_aside_is_forgotten_too(qwen3: HFBackend, tmp_path: Path) -> None:
    killed(known(qwen3, tmp_path, "disk"))
    for name in ("state.json", "events.jsonl"):
        path = tmp_path / "state" / name
        path.write_bytes(b"{" + path.read_bytes() + json.dumps(SECRET.memory).encode("utf-8") + b"\n")
    with pytest.warns(KVMemWarning), open_on(qwen3, tmp_path, "disk") as again:
        assert found(tmp_path)
        again.forget("secret-id")
        nothing_known(again, tmp_path)


def test_a_forgotten_memory_that_can_not_be_deleted_is_told_and_tried_again(
    qwen3: HFBackend, tmp_path: Path, link: None
) -> None:
    with closing(known(qwen3, tmp_path, "cold")) as scheduler:
        FailingLink.down = True
        with pytest.raises(StorageError, match=r"secret-id is forgotten, but .* in cold: .*refused.*Each tick tries"):
            scheduler.forget("secret-id")
        assert found(tmp_path / "state") == {} and found(tmp_path / "cold")
        with pytest.raises(StorageError, match="in cold"):
            scheduler.forget("secret-id")
        FailingLink.down = False
        for _ in range(4):
            scheduler.tick()
        nothing_known(scheduler, tmp_path)


def test_a_full_disk_delays_forgetting_and_says_so(qwen3: HFBackend, tmp_path: Path) -> None:
    with closing(known(qwen3, tmp_path, "disk")) as scheduler:
        with full_disk(300), warnings.catch_warnings():
            warnings.simplefilter("ignore", KVMemWarning)
            with pytest.raises(StorageError, match=r"state\.json can't be written"):
                scheduler.forget("secret-id")
            assert found(tmp_path / "state" / "kv") == {}
        scheduler.tick()
        nothing_known(scheduler, tmp_path)


KILLED_WHILE_FORGETTING = """
import os, signal, sys
from pathlib import Path
from contextlib import closing
from tests.faults.test_forgetting import known
from tests.helpers.tiny import tiny_backend
with closing(known(tiny_backend("qwen3"), Path(sys.argv[1]), "disk")) as scheduler:
    scheduler.items.erase_memories = lambda is_meant: os.kill(os.getpid(), signal.SIGKILL)
    scheduler.index.drop_outdated = lambda: None
    scheduler.forget("secret-id")
"""


def test_a_kill_while_forgetting_forgets_at_the_next_start(qwen3: HFBackend, tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_FORGETTING, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert child.returncode == -signal.SIGKILL and found(tmp_path)
    with open_on(qwen3, tmp_path, "disk") as again:
        nothing_known(again, tmp_path)
        assert again.index.tiers() == {"m0": "disk"}
