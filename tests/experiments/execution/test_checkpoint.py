"""An interrupted run continues where it stopped; another configuration, or a second process, is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.config import compose
from experiments.config.compose import CONF, validate
from experiments.execution import checkpoint, sweep
from experiments.results.run_dir import read_rows, runs_in
from kvmem.errors import ConfigError, StorageError
from tests.helpers import warm_python
from tests.helpers.rows import ttft_row

KNOBS = ["model=tiny", "sink=none", "workload.query_tokens=[32]", "scenario.pairs=2", "scenario.answer_tokens=2"]
TWO_CELLS = "workload.context_tokens=[64,96]"


def run(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return warm_python.run(folder, *overrides, env={"PYTHONPATH": str(CONF.parent)})


def test_only_missing_cells_are_measured(tmp_path: Path) -> None:
    here = [*KNOBS, TWO_CELLS, "hydra.run.dir=run"]
    run(tmp_path, *here)
    rows_file, done_file = tmp_path / "run/rows.jsonl", tmp_path / "run/DONE.json"
    whole = rows_file.read_text()
    first, second = whole.splitlines(keepends=True)
    done = json.loads(done_file.read_text())
    assert done["finished"] and len(done["cells"]) == 2

    # the state after a kill while the second cell's line is written
    rows_file.write_text(first + second[: len(second) // 2])
    done_file.write_text(json.dumps(done | {"cells": done["cells"][:1], "finished": False, "ended": False}))
    again = run(tmp_path, *here)
    assert "1 of 2 cells are already finished" in again.stdout
    assert rows_file.read_text().startswith(first)
    assert [row.context_tokens for row in read_rows(tmp_path / "run")] == [64, 96]
    assert checkpoint.is_finished(tmp_path / "run")

    whole = rows_file.read_text()
    third = run(tmp_path, *here)
    assert "is already finished" in third.stdout and "loading" not in third.stdout
    assert rows_file.read_text() == whole


def test_a_failed_cell_is_tried_again_and_its_row_replaced(tmp_path: Path) -> None:
    here = [*KNOBS, "workload.context_tokens=[9000,64]", "hydra.run.dir=run"]
    for _ in range(2):
        failed = run(tmp_path, *here)
        assert failed.returncode == 1 and "Error executing job" not in failed.stderr  # Hydra's own line
        rows = read_rows(tmp_path / "run")
        assert sorted((row.context_tokens, row.status) for row in rows) == [(64, "done"), (9000, "failed")]
    assert not checkpoint.is_finished(tmp_path / "run")


@pytest.mark.parametrize("verdict", ["invalid", "undecided"])
def test_a_cell_without_a_good_verdict_is_measured_again(tmp_path: Path, verdict: str) -> None:
    here = [*KNOBS, TWO_CELLS, "scenario.pairs=6", "hydra.run.dir=run"]
    run(tmp_path, *here)
    rows_file = tmp_path / "run/rows.jsonl"
    first, second = (json.loads(line) | {"verdict": "ok"} for line in rows_file.read_text().splitlines())
    rows_file.write_text("".join(json.dumps(line) + "\n" for line in (first, second | {"verdict": verdict})))
    assert checkpoint.is_finished(tmp_path / "run") and not checkpoint.is_settled(tmp_path / "run")
    again = run(tmp_path, *here)
    assert "1 of 2 cells are already finished" in again.stdout
    assert f"measuring 1 96/32 again: it was {verdict}" in again.stdout
    kept, new = (json.loads(line) for line in rows_file.read_text().splitlines())
    assert kept["payload"] == first["payload"] and new["payload"] != second["payload"]
    assert new["conditions"]["earlier_verdicts"] == [verdict] and "earlier_verdicts" not in kept["conditions"]
    if new["verdict"] != "ok":
        assert "To measure 1 cell again: python -m experiments.run" in again.stdout
    assert (new["verdict"] == "undecided") == ("OMP_WAIT_POLICY=passive" in again.stdout)
    assert checkpoint.is_finished(tmp_path / "run")


def test_too_few_pairs_and_good_rows_are_settled(tmp_path: Path) -> None:
    good, few, noisy = (
        ttft_row(pairs=pairs, verdict=verdict, conditions={"cell": verdict})
        for pairs, verdict in ((6, "ok"), (5, "undecided"), (6, "undecided"))
    )
    assert checkpoint.unsettled([good, few]) == {} and checkpoint.unsettled([noisy]) == {"undecided": "undecided"}
    simulated = ttft_row(pairs=0, verdict="undecided", conditions={"cell": "simulated"})
    assert checkpoint.unsettled([few, simulated]) == {}
    assert checkpoint.unsettled([simulated, noisy]).keys() == {"simulated", "undecided"}
    for times in (1, 2):  # the ledger remembers the verdicts of all earlier measurements
        with checkpoint.opened(tmp_path, {"seed": 0}) as done:
            done.ended = True
            done.finish("undecided")
            (tmp_path / "rows.jsonl").write_text(noisy.to_json() + "\n")
            assert done.finished_rows() == [] and done.cells == []
            assert done.earlier == {"undecided": ["undecided"] * times}
        (tmp_path / "rows.jsonl").unlink()


@pytest.mark.parametrize("left", [0, 1, None], ids=["none", "one", "no file"])
def test_a_finished_cell_whose_row_is_lost_is_measured_again(tmp_path: Path, left: int | None) -> None:
    lines = [ttft_row(context, conditions={"cell": f"{context}/32"}).to_json() + "\n" for context in (64, 96)]
    with checkpoint.opened(tmp_path, {"seed": 0}) as done:
        done.finish("64/32")
        done.finish("96/32")
        done.finished = True
        done.write()
    if left is not None:
        (tmp_path / "rows.jsonl").write_text("".join(lines[:left]) + lines[left][:50])
    with checkpoint.opened(tmp_path, {"seed": 0}) as again:
        assert [row.context_tokens for row in again.finished_rows()] == [64][: left or 0]
        assert again.cells == ["64/32"][: left or 0] and not again.finished
    assert not checkpoint.is_finished(tmp_path)


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    with checkpoint.opened(tmp_path, {"seed": 0}):
        pass
    with (
        pytest.raises(ConfigError, match="holds rows of another configuration"),
        checkpoint.opened(tmp_path, {"seed": 1}),
    ):
        pass


def test_rows_without_a_ledger_are_not_overwritten(tmp_path: Path) -> None:
    """An older version leaves such a run, or a copy without DONE.json."""
    rows = ttft_row().to_json() + "\n"
    (tmp_path / "rows.jsonl").write_text(rows)
    with pytest.raises(ConfigError, match=r"holds rows, but no DONE\.json"), checkpoint.opened(tmp_path, {"seed": 0}):
        pass
    assert (tmp_path / "rows.jsonl").read_text() == rows


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    with (
        checkpoint.opened(tmp_path, {"seed": 0}),
        pytest.raises(StorageError, match=f"is being written by process {os.getpid()} on "),
        checkpoint.opened(tmp_path, {"seed": 0}),
    ):
        pass


def test_the_same_command_finds_its_sweep_and_another_one_does_not() -> None:
    command = ["model=tiny", "seed=0,1"]
    folder = sweep.folder_of(command)
    assert folder.parts[:2] == ("outputs", "sweeps") and folder.name.startswith("kv_vs_direct-")
    assert sweep.folder_of([*command, "launcher=joblib", "sink=none", "tracebacks=true"]) == folder
    assert sweep.folder_of(["model=tiny", "seed=0,2"]) != folder
    assert sweep.folder_of([*command, "merge=ropeshift"]) != folder


@pytest.mark.parametrize("plus", ["", "++"])
def test_hydra_uses_the_chosen_sweep_folder(plus: str) -> None:
    folder = sweep.folder_of(["model=tiny", "seed=0,1", plus + "hydra.sweep.dir='my runs/${hydra.job.name}'"])
    assert folder == Path("my runs/run")


def moved(cards: dict[str, Any], module: str) -> dict[str, Any]:
    """The same cards with their classes in another module."""
    paths = {key: f"{module}.{card['_target_'].rpartition('.')[2]}" for key, card in cards.items() if is_card(card)}
    inside = {key: card | {"_target_": paths[key]} if key in paths else card for key, card in cards.items()}
    return inside | {"_target_": f"{module}.RunConfig"}


def is_card(card: object) -> bool:
    return isinstance(card, dict) and "_target_" in card


def test_the_hash_ignores_where_a_class_lies_and_depends_on_its_knobs() -> None:
    cards = compose.resolved(compose.compose(["model=tiny", "merge=ropeshift"]))
    assert checkpoint.config_hash(moved(cards, "kvmem.elsewhere")) == checkpoint.config_hash(cards)
    for other in ("merge=naive_concat", "model.seed=1", "hardware.tensor_parallel=2"):
        others = compose.resolved(compose.compose(["model=tiny", "merge=ropeshift", other]))
        assert checkpoint.config_hash(others) != checkpoint.config_hash(cards), other


BEGUN_BEFORE = ("model=tiny", "scenario.pairs=2", "seed=0,1")


def begun_before(folder: Path) -> None:
    """The sweep folder of an older version, whose hashes held the paths of classes, and whose cards had no `mode`."""
    for number, job in enumerate(compose.expand(BEGUN_BEFORE)):
        composed = compose.compose(job)
        cards = moved(compose.resolved(composed), "experiments.config")
        cards["backend"] |= dataclasses.asdict(validate(composed).backend)
        del cards["tracebacks"]
        (folder / str(number)).mkdir(parents=True)
        (folder / str(number) / "config.yaml").write_text(yaml.safe_dump(cards))
        done = {"config_hash": "0123456789ab", "cells": ["64/32"], "finished": False}
        (folder / str(number) / "DONE.json").write_text(json.dumps(done))
        row = ttft_row(64, conditions={"cell": "64/32"}).to_json()
        (folder / str(number) / "rows.jsonl").write_text(row + "\n")


def test_a_sweep_that_an_older_version_began_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    old = Path("outputs/sweeps/kv_vs_direct-fedcba987654")
    begun_before(old)
    assert sweep.folder_of(BEGUN_BEFORE) == old
    assert sweep.folder_of([*BEGUN_BEFORE, "template=plain"]) != old
    job = compose.expand(BEGUN_BEFORE)[1]
    with checkpoint.opened(old / "1", compose.resolved(compose.compose(job))) as done:
        assert done.cells == ["64/32"] and [row.context_tokens for row in done.finished_rows()] == [64]
    with pytest.raises(ConfigError, match="another configuration"), checkpoint.opened(old / "1", {"seed": 5}):
        pass


def test_an_override_may_interpolate_a_value_of_its_job() -> None:
    jobs = compose.expand(["seed=3,4", "workload.seed=${seed}", "hydra.sweep.subdir=job_${hydra.job.num}"])
    assert [job[-1] for job in jobs] == ["hydra.sweep.subdir=job_${hydra.job.num}"] * 2
    assert [compose.compose(job).workload.seed for job in jobs] == [3, 4]


def test_the_jobs_of_a_sweep_may_have_any_name(tmp_path: Path) -> None:
    for name in ("job_0", "job_1"):
        (tmp_path / name).mkdir()
        with checkpoint.opened(tmp_path / name, {"seed": 0}) as done:
            done.finished = name == "job_0"
            done.write()
    (tmp_path / "plots").mkdir()
    assert sweep.summary(tmp_path)[:2] == [
        f"1 of 2 jobs finished, in {tmp_path}",
        "not finished: job_1. The same command continues them.",
    ]


def test_a_finished_sweep_has_a_joined_report(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", *KNOBS, "workload.context_tokens=[64]", "seed=0,1", "launcher=joblib")
    (folder,) = (tmp_path / "outputs/sweeps").iterdir()
    assert "2 of 2 jobs finished" in done.stdout
    assert [path.name for path in runs_in(folder)] == ["0", "1"]
    assert "2 rows" in (folder / "table.md").read_text()
