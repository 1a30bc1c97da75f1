"""A file that changes while a memory is mapped from it: noticed before the memory is used, and named by the error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvmem import KVCacheItem, KVCacheMemory, TextualMemoryItem
from kvmem.engines.graph.backend import HFGraphBackend
from kvmem.engines.graph.config import GraphConfig
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import ChangedFileError, DamagedFileError
from kvmem.merge.ropeshift import RopeShift
from kvmem.scheduler.cost_model import Costs, kv_bytes_a_token
from kvmem.scheduler.scheduler import MemScheduler
from kvmem.tiers import TieredCache
from tests.helpers.tiny import copy_of, loaded, memory_on, pairs, same_bits

(TEXT, QUERY), (OTHER_TEXT, _) = pairs(2, characters=500, seed=3)
CHECKOUT = Path(__file__).parents[2]


def overwrite(path: Path) -> None:
    """Changes every byte of the second half of the file, in place: the same size, the same inode."""
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(size // 2)
        rest = file.read()
        file.seek(size // 2)
        file.write(bytes(byte ^ 0x11 for byte in rest))


def overwrite_and_set_the_time_back(path: Path) -> None:
    before = path.stat()
    overwrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture(scope="module", params=["huggingface", "hf_graph"])
def engine(request: pytest.FixtureRequest) -> HFBackend:
    """Each engine that computes in this process."""
    if request.param == "huggingface":
        return HFBackend(loaded("tiny"))
    return HFGraphBackend(loaded("tiny"), config=GraphConfig(capacity_tokens=1024))


def loaded_memory(engine: HFBackend, folder: Path, **fields: object) -> tuple[KVCacheMemory, list[KVCacheItem], Path]:
    """A memory of two items that was loaded from a file, the items, and the path of the file."""
    memory = memory_on(engine, **fields)
    memory.add([memory.extract(TEXT), memory.extract(OTHER_TEXT)])
    path = memory.dump(folder)
    again = memory_on(engine, **fields)
    again.load(folder)
    return again, again.get_all(), path


@pytest.mark.parametrize("change", [overwrite, overwrite_and_set_the_time_back])
def test_no_use_of_an_overwritten_file_gives_an_answer(
    engine: HFBackend, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    memory, (item, other), path = loaded_memory(engine, tmp_path, merge=RopeShift())
    view = memory.get_cache(item.kv_cache_id)
    elsewhere = tmp_path / "elsewhere"
    change(path)
    uses: dict[str, Callable[[], Any]] = {
        "a view that was taken before": lambda: engine.generate(QUERY, view, 8),
        "a stream": lambda: list(engine.stream(QUERY, memory.get_cache(item.kv_cache_id), 8)),
        "a new view": lambda: memory.get_cache(item.kv_cache_id),
        "a merge": lambda: memory.get_cache([item.kv_cache_id, other.kv_cache_id]),
        "a base": lambda: memory.extract([{"role": "user", "content": QUERY}], base=item),
        "a dump": lambda: memory.dump(elsewhere),
        "a tier": lambda: TieredCache(engine, {"ram": 1 << 30}).put(item, "ram"),
    }
    for name, use in uses.items():
        with pytest.raises(ChangedFileError, match=f"{path} was overwritten after it was loaded"):
            use()
            pytest.fail(name)
    assert not (elsewhere / path.name).exists()


CUT_OFF = """
import os, sys
from pathlib import Path
from kvmem.errors import ChangedFileError
from tests.faults.test_files_changed import QUERY, loaded_memory
from tests.helpers.tiny import tiny_backend
engine = tiny_backend("qwen3")
memory, (item, _), path = loaded_memory(engine, Path(sys.argv[1]))
view = memory.get_cache(item.kv_cache_id)
os.truncate(path, 4096)
for use in (
    lambda: engine.generate(QUERY, view, 8),
    lambda: memory.get_cache(item.kv_cache_id),
    lambda: memory.dump(path.parent / "elsewhere"),
):
    try:
        use()
    except ChangedFileError as error:
        assert f"{path} was cut off" in str(error)
        print("refused")
"""


def test_a_file_that_is_cut_off_does_not_kill_the_process(tmp_path: Path) -> None:
    """Reading a mapped page behind the end of the file raises SIGBUS, which ends a process."""
    done = subprocess.run([sys.executable, "-c", CUT_OFF, str(tmp_path)], cwd=CHECKOUT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["refused"] * 3), done.stderr


def test_copied_tensors_do_not_depend_on_the_file(engine: HFBackend, tmp_path: Path) -> None:
    """Also where a file is cut off in the middle of a prefill, which ends a process whose tensors are mapped."""
    memory, (item, _), path = loaded_memory(engine, tmp_path, copy_files=True)
    before, expected = copy_of(item), engine.generate(QUERY, memory.get_cache(item.kv_cache_id), 8)
    view = memory.get_cache(item.kv_cache_id)
    os.truncate(path, 4096)
    assert engine.generate(QUERY, view, 8) == expected
    assert same_bits(item, before) and memory.dump(tmp_path / "elsewhere").stat().st_size > 4096


def touch(path: Path) -> None:
    os.utime(path)


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"behind the end")


def replace_by_another_file(path: Path) -> None:
    shutil.copy(path, path.with_name("new"))
    overwrite(path.with_name("new"))
    os.replace(path.with_name("new"), path)


@pytest.mark.parametrize("change", [touch, append, Path.unlink, replace_by_another_file])
def test_what_leaves_the_mapped_bytes_as_they_are_is_accepted(
    engine: HFBackend, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    memory, (item, _), path = loaded_memory(engine, tmp_path)
    before, expected = copy_of(item), engine.generate(QUERY, memory.get_cache(item.kv_cache_id), 8)
    change(path)
    assert engine.generate(QUERY, memory.get_cache(item.kv_cache_id), 8) == expected
    assert expected.cached_tokens and same_bits(item, before)


def test_a_memory_that_was_overwritten_can_be_loaded_again(qwen3: HFBackend, tmp_path: Path) -> None:
    memory, (item, _), path = loaded_memory(qwen3, tmp_path)
    expected = qwen3.generate(QUERY, memory.get_cache(item.kv_cache_id), 8)
    intact = path.read_bytes()
    overwrite(path)
    with pytest.raises(DamagedFileError, match=str(path)):
        memory.load(tmp_path)
    with pytest.raises(ChangedFileError):
        memory.get_cache(item.kv_cache_id)
    path.write_bytes(intact)
    assert memory.load(tmp_path) == 2
    assert qwen3.generate(QUERY, memory.get_cache(item.kv_cache_id), 8) == expected


def test_an_item_in_use_from_the_disk_tier_is_checked(qwen3: HFBackend, tmp_path: Path) -> None:
    memory = memory_on(qwen3)
    item = memory.extract(TEXT)
    tiers = TieredCache(qwen3, {"disk": 1 << 30}, tmp_path)
    tiers.put(item, "disk")
    (path,) = tmp_path.glob("*.safetensors")
    with tiers.use(item.kv_cache_id) as used:
        memory.add(used)
        view = memory.get_cache(used.kv_cache_id)
        overwrite(path)
        with pytest.raises(ChangedFileError, match=path.name):
            qwen3.generate(QUERY, view, 8)
        with pytest.raises(ChangedFileError, match=path.name):
            memory.get_cache(used.kv_cache_id)
    with pytest.raises(DamagedFileError, match=path.name), tiers.use(item.kv_cache_id):
        pass
    tiers.close()


def test_a_scheduler_answers_from_the_text_and_says_so(qwen3: HFBackend, tmp_path: Path) -> None:
    text = TextualMemoryItem(id="m", memory=TEXT)
    costs = Costs(0.001, 1e-4, 0.0, kv_bytes_a_token(qwen3))
    with MemScheduler(memory_on(qwen3), "benefit_per_byte", {"disk": 1 << 30}, tmp_path, costs) as scheduler:
        for _ in range(4):
            expected = scheduler.answer(QUERY, [text], 8)
        scheduler.tick()
        assert scheduler.answer(QUERY, [text], 8).cached_tokens
        (path,) = tmp_path.rglob("*.safetensors")
        overwrite(path)
        answer = scheduler.answer(QUERY, [text], 8)
    assert answer.token_ids == expected.token_ids and answer.cached_tokens == 0
    assert path.name in answer.note


@contextmanager
def with_kv_on_disk(engine: HFBackend, folder: Path) -> Iterator[tuple[MemScheduler, TextualMemoryItem, Path]]:
    """A scheduler with a memory in its disk tier, the memory, and the path of its KV."""
    text = TextualMemoryItem(id="m", memory=TEXT)
    costs = Costs(0.001, 1e-4, 0.0, kv_bytes_a_token(engine))
    with MemScheduler(
        memory_on(engine), "benefit_per_byte", {"disk": 1 << 30}, folder, costs, admit_misses=False
    ) as scheduler:
        for _ in range(4):
            scheduler.observe(text, QUERY)
        scheduler.tick()
        assert scheduler.answer(QUERY, [text], 8).cached_tokens
        (path,) = folder.rglob("*.safetensors")
        yield scheduler, text, path


def test_a_file_that_changes_between_load_and_view_costs_no_answer(
    qwen3: HFBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = qwen3.generate([{"role": "system", "content": TEXT}, {"role": "user", "content": QUERY}], None, 8)
    with with_kv_on_disk(qwen3, tmp_path) as (scheduler, text, path):
        use = scheduler.items.use

        @contextmanager
        def use_and_overwrite(item_id: str) -> Iterator[KVCacheItem]:
            with use(item_id) as item:
                overwrite(path)
                yield item

        monkeypatch.setattr(scheduler.items, "use", use_and_overwrite)
        answer = scheduler.answer(QUERY, [text], 8)
        assert answer.token_ids == expected.token_ids and answer.cached_tokens == 0
        assert path.name in answer.note and "overwritten" in scheduler.prefix_selector.unreadable["m"]
        assert not scheduler.index.tiers() and not path.exists() and not scheduler.items.used_bytes()["disk"]


def test_a_file_that_changes_while_an_answer_reads_it_costs_no_answer(engine: HFBackend, tmp_path: Path) -> None:
    expected = engine.generate([{"role": "system", "content": TEXT}, {"role": "user", "content": QUERY}], None, 8)
    with with_kv_on_disk(engine, tmp_path) as (scheduler, text, path):
        split = engine.split

        def split_and_overwrite(*given: Any) -> Any:
            prompt = split(*given)
            if path.exists():
                overwrite(path)
            return prompt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "split", split_and_overwrite)
            answer = scheduler.answer(QUERY, [text], 8)
        assert answer.token_ids == expected.token_ids and answer.cached_tokens == 0
        assert path.name in answer.note and "overwritten" in scheduler.prefix_selector.unreadable["m"]
        assert not scheduler.index.tiers() and not path.exists() and not scheduler.items.used_bytes()["disk"]
        scheduler.tick()
        assert scheduler.planner.table.now == 6, "both answers are observed, and the failed attempt is not"
