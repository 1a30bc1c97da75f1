"""The folder of a run: one for each run, and one line where it can't be written."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from experiments.execution import UNDECIDED, checkpoint, run_experiment, run_folder
from experiments.results import read_rows
from kvmem.errors import ConfigError, StorageError
from tests.faults.commands import ENV, THREE_CELLS, TINY, run
from tests.helpers import mounts
from tests.helpers.rows import grid


def test_runs_of_one_second_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: run_folder.new(), range(24)))
    assert len(set(folders)) == 24 and all(folder.is_dir() for folder in folders)
    assert all(folder.parts[0] == "outputs" and len(folder.parts) == 3 for folder in folders)


def test_a_folder_that_cannot_be_made_is_one_line_before_the_model_loads(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    status, output = run(tmp_path, *TINY, "hydra.run.dir=taken/run")
    assert status == 1
    (line,) = output.splitlines()
    assert line.startswith("error: ") and "taken/run" in line and "hydra.run.dir=" in line
    with pytest.raises(StorageError, match="taken/run can't be written"):
        run_experiment(*TINY, out=tmp_path / "taken/run")


@pytest.mark.skipif(bool(mounts.why_not()), reason=f"no disk of its own for a test: {mounts.why_not()}")
@pytest.mark.parametrize(("sink", "size"), [("none", "34k"), ("wandb", "76k")])
def test_a_full_disk_is_one_line_and_the_rows_before_are_whole(sink: str, size: str, tmp_path: Path) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    command = [sys.executable, "-m", "experiments.run", *TINY, THREE_CELLS, f"sink={sink}", "hydra.run.dir=disk"]
    script = "import shutil, subprocess, sys; code = subprocess.run(sys.argv[2:]).returncode; "
    script += "shutil.copytree('disk', sys.argv[1], ignore=shutil.ignore_patterns('wandb')); sys.exit(code)"
    done = subprocess.run(
        mounts.with_disk(disk, f"size={size}", [sys.executable, "-c", script, str(kept), *command]),
        cwd=tmp_path,
        env=os.environ | ENV | {"WANDB_MODE": "offline"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stdout and "Logging error" not in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith("error: ") and "No space left on device" in last and "hydra.run.dir=disk" in last
    rows = read_rows(kept)
    text = (kept / "rows.jsonl").read_text()
    assert len(rows) in (1, 2, 3) and text.count("\n") == len(rows) and text.endswith("\n")
    status, output = run(tmp_path, *TINY, THREE_CELLS, "hydra.run.dir=kept")
    assert status in (0, UNDECIDED), output
    assert read_rows(kept)[0] == rows[0] and len(read_rows(kept)) == 3


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'{"cells": 3}', b'{"config_ha', b"\xff\xfe"])
def test_a_damaged_ledger_is_named_and_rows_are_kept(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "DONE.json").write_bytes(content)
    rows = "".join(f"{row.to_json()}\n" for row in grid()[:2])
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "config.yaml").write_bytes(content)
    assert not checkpoint.is_finished(tmp_path)
    with (
        pytest.raises(ConfigError, match=r"holds rows, but no DONE\.json that can be read"),
        checkpoint.opened(tmp_path, {}),
    ):
        pass
    assert (tmp_path / "rows.jsonl").read_text() == rows
