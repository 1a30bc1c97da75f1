"""Sinks: rows.jsonl, and an offline W&B run that W&B's own reader reads back."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.reporting import plots
from experiments.results import Row, ttft_of
from experiments.results.run_dir import read_rows
from experiments.sinks import wandb
from experiments.sinks.jsonl import JSONL
from experiments.sinks.none import NoSink
from experiments.sinks.wandb import WandB, log_run, metrics
from kvmem.errors import ConfigError
from tests.helpers.rows import failed_row, grid, invalid_row

ROWS = [*grid()[:3], invalid_row(), failed_row()]
CONFIG = {"model": {"label": "tiny"}, "seed": 3}


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Removes W&B's login and settings, and returns the path of an empty home folder."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    # The sink sets these variables if they are not set. monkeypatch removes them afterwards.
    for folder in ("CACHE", "DATA", "ARTIFACT", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{folder}_DIR", "")
        monkeypatch.delenv(f"WANDB_{folder}_DIR")
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


def write(sink: JSONL | WandB | NoSink, run_dir: Path) -> str | None:
    run_dir.mkdir(exist_ok=True)
    sink.check()
    sink.open(run_dir, CONFIG)
    for row in ROWS:
        sink.write(row)
    return sink.close(run_dir)


def read_back(run_dir: Path) -> list[dict[str, Any]]:
    """Every record of the one W&B run in `run_dir`, read by W&B's own reader."""
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


def kv_ttft_s(rows: list[Row]) -> list[float | None]:
    return [figures.kv_ttft_s if (figures := ttft_of(row)) else None for row in rows]


def history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def test_jsonl_keeps_each_row_as_it_is_written(tmp_path: Path) -> None:
    sink = JSONL()
    sink.open(tmp_path, CONFIG)
    for count, row in enumerate(ROWS, start=1):
        sink.write(row)
        assert read_rows(tmp_path) == ROWS[:count]  # on disk before it is closed
    sink.close(tmp_path)


def test_jsonl_of_a_killed_run_lacks_only_the_row_cut_short(tmp_path: Path) -> None:
    write(JSONL(), tmp_path)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert read_rows(tmp_path) == ROWS[:-1]


def test_none_writes_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert write(NoSink(), run_dir) is None
    assert list(run_dir.iterdir()) == []


def test_wandb_offline_run_holds_what_rows_jsonl_holds(tmp_path: Path, no_account: Path) -> None:
    run_dir = tmp_path / "run"
    write(JSONL(), run_dir)
    written = plots.write_plots(ROWS, run_dir / "plots")
    said = write(WandB(name="a run"), run_dir)
    records = read_back(run_dir)

    (run,) = [record["run"] for record in records if record["type"] == "run"]
    assert run["project"] == "kvmem"
    assert run["config"]["update"]["model"] == CONFIG["model"] and run["config"]["update"]["seed"] == 3

    scalars = [item for item in history(records) if "cell" in item]
    rows = read_rows(run_dir)
    assert [item["cell"] for item in scalars] == list(range(len(rows)))
    for row, item in zip(rows, scalars, strict=True):
        logged = {name: value for name, value in item.items() if not name.startswith("_")}
        assert logged == {"cell": item["cell"], **metrics(row)}
        assert (row.payload is None) == ("kv_ttft_s" not in item)

    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    (table_file,) = (folder / "files" / "media" / "table").iterdir()
    table = json.loads(table_file.read_text())
    assert [line[table["columns"].index("error")] for line in table["data"]] == [row.error for row in rows]
    assert [line[table["columns"].index("kv_ttft_s")] for line in table["data"]] == kv_ttft_s(rows)

    shown = {name.split(".")[0] for item in history(records) for name in item if name.startswith("plots/")}
    assert shown == {f"plots/{path.stem}" for path in written if path.suffix == ".png"} != set()
    assert said is not None and str(folder) in said
    assert list(no_account.rglob("*")) == []  # nothing was written to the home folder


def test_the_rows_of_a_killed_run_can_be_sent_later(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    write(JSONL(), run_dir)
    with (run_dir / "rows.jsonl").open("a") as file:
        file.write('{"model": "cut sho')
    sink = {"_target_": "experiments.sinks.wandb.WandB", "project": "mine", "mode": "offline"}
    (run_dir / "config.yaml").write_text(yaml.safe_dump({"sink": sink, "seed": 3}))
    log_run(run_dir)
    records = read_back(run_dir)
    assert [record["run"]["project"] for record in records if record["type"] == "run"] == ["mine"]
    logged = [item["kv_ttft_s"] for item in history(records) if "kv_ttft_s" in item]
    assert logged == [time for time in kv_ttft_s(ROWS) if time is not None]


@pytest.mark.parametrize(
    ("card", "variable", "expected"),
    [
        ("auto", None, "offline"),
        ("auto", "online", "online"),
        ("auto", "disabled", "disabled"),
        ("auto", "dryrun", "offline"),
        ("offline", "online", "offline"),
        ("online", "offline", "online"),
    ],
)
def test_the_mode_comes_from_the_card_or_the_environment(
    card: Any, variable: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert WandB(mode=card).resolved_mode() == expected


def test_a_misspelled_mode_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(ConfigError, match="Did you mean offline"):
        WandB().check()


SCRIPT = """
from pathlib import Path
from experiments.sinks.wandb import WandB
sink = WandB()
sink.check()
sink.open(Path("."), {})
print(sink.close(Path(".")))
"""


@pytest.mark.parametrize("stdin", ["terminal", "closed"])
@pytest.mark.parametrize("mode", ["auto", "online"])
def test_never_asks_for_a_login(stdin: str, mode: str, tmp_path: Path) -> None:
    """Without an account: offline works, and online raises a ConfigError; neither waits for input."""
    terminal, end = pty.openpty()
    env = os.environ | {"PYTHONPATH": str(Path(wandb.__file__).parents[2])}
    if mode == "online":
        env["WANDB_MODE"] = "online"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env=env,
        stdin=end if stdin == "terminal" else subprocess.DEVNULL,
        stderr=end,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    os.close(end)
    said = os.read(terminal, 100_000).decode() if mode == "online" else ""
    os.close(terminal)
    if mode == "online":
        assert done.returncode == 1 and "needs a login to W&B" in said
    else:
        assert done.returncode == 0 and "offline-run-" in done.stdout
