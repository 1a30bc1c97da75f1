"""The storage scenario at a tiny size: both formats, the fields of a row, and the memory figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.audit.figures import check_row, checked_as
from experiments.bench.bench import Bench
from experiments.config import compose
from experiments.measurement.process_memory import peak_extra_bytes
from experiments.reporting import tables
from experiments.results import Row
from experiments.scenarios.storage import StoragePayload
from kvmem.cache.dynamic_cache import layers_of
from kvmem.errors import StorageError
from kvmem.storage.safetensors_file import SafetensorsFile

MB = 1 << 20
TINY = ["model=tiny", "model.weights=random", "scenario=storage", "scenario.gigabytes=0.002", "scenario.repeats=6"]


def bench(tmp_path: Path, *overrides: str) -> Bench:
    arguments = [*TINY, f"scenario.folder={tmp_path}", "hardware.check=false", *overrides]
    return Bench.open(compose.validate(compose.compose(arguments)))


@pytest.mark.parametrize("name", ["safetensors", "pickle"])
def test_a_row_has_the_times_of_both_formats(tmp_path: Path, name: str) -> None:
    on = bench(tmp_path, f"storage={name}")
    (cell,) = on.setup.scenario.cells(on)
    (row,) = on.setup.scenario.measure(on, cell)
    assert (row.arm, row.equality, row.pairs) == (name, "bitwise", 6)
    assert row.verdict in ("ok", "undecided"), row.verdict_reason
    stored = Row.from_json(row.to_json())
    assert checked_as(stored) == "judged again" and check_row(stored) == []
    figures = row.payload
    assert isinstance(figures, StoragePayload) and 0.0018e9 < figures.kv_bytes <= 0.002e9
    assert figures.dump_ratio == pytest.approx(figures.dump_s / figures.torch_save_s)
    assert figures.load_ratio == pytest.approx(figures.load_s / figures.torch_load_s)
    samples = (figures.dump_all_s, figures.torch_save_all_s, figures.load_all_s, figures.torch_load_all_s)
    assert [len(seconds) for seconds in samples] == [6, 6, 6, 6]
    assert tables.tables([row])
    assert list(tmp_path.iterdir()) == [], "the scenario removes its files"


def test_changed_tensors_make_the_row_invalid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on = bench(tmp_path)
    (cell,) = on.setup.scenario.cells(on)
    load = SafetensorsFile.load

    def changed(*args):
        items = load(*args)
        layers_of(items[0].kv_cache)[0][0].view(-1)[0] += 1
        return items

    monkeypatch.setattr(SafetensorsFile, "load", changed)
    (row,) = on.setup.scenario.measure(on, cell)
    assert (row.verdict, row.equality) == ("invalid", "diverged")


def test_the_peak_counts_memory_that_is_freed_before_the_end() -> None:
    def work() -> str:
        temporary = torch.ones(64 * MB, dtype=torch.uint8)
        for _ in range(20):
            temporary.add_(1)
        return "done"

    result, extra_bytes = peak_extra_bytes(work)
    assert result == "done"
    assert 60 * MB < extra_bytes < 100 * MB


def test_the_watcher_stops_when_the_work_raises() -> None:
    def work() -> None:
        raise StorageError("full")

    with pytest.raises(StorageError, match="full"):
        peak_extra_bytes(work)
