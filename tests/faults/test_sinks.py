"""A sink that fails, in whatever way, costs no rows: one line says what happened and how to send them later."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from experiments.execution import UNDECIDED
from experiments.results import read_rows
from experiments.sinks import JSONL, Guarded
from kvmem.models import loading
from tests.faults.broken_sink import Broken
from tests.faults.commands import ENV, ONE_CELL, TINY, run
from tests.helpers.rows import grid

KEY = "0" * 40


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Environment variables of an account on a W&B server whose port is closed, and an empty home folder."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    home = tmp_path / "home"
    home.mkdir()
    models = str(loading.cache_folder())  # stays the user's, whatever the home folder
    return {"HOME": str(home), "KVMEM_CACHE": models, "WANDB_BASE_URL": url, "WANDB_API_KEY": KEY}


def logged(run_dir: Path) -> list[dict[str, object]]:
    """What the offline W&B run in `run_dir` has, by W&B's own reader."""
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    records = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def test_an_online_run_goes_offline_if_the_service_is_down(tmp_path: Path, account: dict[str, str]) -> None:
    online = (*TINY, ONE_CELL, "sink=wandb", "sink.mode=online", "hydra.run.dir=run")
    status, output = run(tmp_path, *online, **account)
    assert status in (0, UNDECIDED), output
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("W&B failed (")]
    (folder,) = (tmp_path / "run/wandb").glob("offline-run-*")
    assert line.endswith(f"This run continues offline. To send it later: wandb sync {folder.relative_to(tmp_path)}")
    (row,) = read_rows(tmp_path / "run")
    assert row.status == "done"
    assert [item["context_tokens"] for item in logged(tmp_path / "run") if "cell" in item] == [64]


class Refuses(BaseHTTPRequestHandler):
    """Answers that the API key is not valid."""

    def do_POST(self) -> None:
        self.send_response(401)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def refusing(account: dict[str, str]) -> Iterator[dict[str, str]]:
    """The same account on a server that refuses it."""
    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield account | {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}"}
        server.shutdown()


SCRIPT = """
import logging, sys
from pathlib import Path
import psutil
from experiments.sinks import Guarded, JSONL, WandB
from tests.helpers.rows import grid

logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)

def job(name, mode, kill):
    run_dir = Path(name)
    run_dir.mkdir()
    sinks = [JSONL(), Guarded(WandB(mode=mode), run_dir)]
    for sink in sinks:
        sink.check()
        sink.open(run_dir, {})
    for row in grid()[:3]:
        for sink in sinks:
            sink.write(row)
        if kill:
            for child in psutil.Process().children(recursive=True):
                child.kill()
                child.wait()
            kill = False
    for sink in sinks:
        print(sink.close(run_dir))

"""


def script(folder: Path, env: dict[str, str], *jobs: str) -> list[str]:
    """The output, with stderr, of sinks in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + "\n".join(jobs)],
        cwd=folder,
        env=os.environ | ENV | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()


def test_an_online_run_goes_offline_if_the_login_is_refused(tmp_path: Path, refusing: dict[str, str]) -> None:
    output = script(tmp_path, refusing, "job('run', 'online', kill=False)")
    lines = [line for line in output if line.startswith("W&B failed (")]
    assert len(lines) == 1 and "To send it later: wandb sync run/wandb/offline-run-" in lines[0]
    assert read_rows(tmp_path / "run") == grid()[:3]


def test_a_service_that_dies_while_it_logs_is_one_line_and_the_next_job_has_another(
    tmp_path: Path, account: dict[str, str]
) -> None:
    jobs = ("job('first', 'offline', kill=True)", "job('second', 'offline', kill=False)")
    output = script(tmp_path, account, *jobs)
    (line,) = [line for line in output if "failed" in line]
    assert line.startswith("WandB failed while it took a row (")
    assert line.endswith("To send them to W&B later: python -m experiments.report --log first")
    assert not any("Traceback" in line for line in output)
    for name in ("first", "second"):
        assert read_rows(tmp_path / name) == grid()[:3]
    assert len([item for item in logged(tmp_path / "second") if "cell" in item]) == 3
    done = subprocess.run(
        [sys.executable, "-m", "experiments.report", "--log", "first"],
        cwd=tmp_path,
        env=os.environ | ENV | account | {"WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "wandb sync first/wandb/offline-run-" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("at", ["check", "open", "write", "close"])
def test_any_failure_of_a_sink_is_one_line(at: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink, rows = Guarded(Broken(at), tmp_path), JSONL()
    rows.open(tmp_path, {})
    with caplog.at_level(logging.WARNING):
        sink.check()
        sink.open(tmp_path, {})
        for row in grid()[:3]:
            rows.write(row)
            sink.write(row)
        sink.close(tmp_path)
    (record,) = caplog.records
    (line,) = record.getMessage().splitlines()
    assert line.startswith("Broken failed ") and f"the sink breaks at {at}" in line and str(tmp_path) in line
    assert read_rows(tmp_path) == grid()[:3]


def test_a_run_with_a_sink_that_fails_is_whole(tmp_path: Path) -> None:
    sink = ("sink._target_=tests.faults.broken_sink.Broken", "+sink.at=write", "hydra.run.dir=run")
    status, output = run(tmp_path, *TINY, ONE_CELL, *sink)
    assert status in (0, UNDECIDED), output
    assert output.count("Broken failed while it took a row (ZeroDivisionError: the sink breaks at write)") == 1
    assert len(read_rows(tmp_path / "run")) == 1 and (tmp_path / "run/report.html").is_file()
