"""An audit finds whatever in a run's folder contradicts the samples that its rows store."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import verify
from experiments.audit import audit, measure_anew
from experiments.config.compose import CONF
from experiments.results import Row
from kvmem.errors import ConfigError

REFERENCE = CONF.parent / "outputs/reference"
GROUP = pytest.mark.xdist_group("measured for an audit")
KNOBS = [
    *("model=tiny", "sink=wandb", "sink.mode=offline", "scenario.answer_tokens=2", "hardware.check=false"),
    *("workload.query_tokens=[32]", "workload.context_tokens=[64,96]", "hydra.run.dir=run"),
]


def texts(folder: Path) -> list[str]:
    return [str(finding) for finding in audit(folder).findings if finding.differs]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a reference run whose rows store every timed call."""
    return Path(shutil.copytree(REFERENCE / "default_smollm2_cpu", tmp_path / "run"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two cells of the tiny model with a page and an offline W&B run, by commit `one`."""
    here = tmp_path_factory.mktemp("measured")
    run(here, "one")
    return here / "run"


def run(here: Path, commit: str) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env |= {"PYTHONPATH": str(CONF.parent), "KVMEM_COMMIT": commit}
    command = [sys.executable, "-m", "experiments.run", *KNOBS]
    return subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, check=False).stdout


def edit(folder: Path, change: Callable[[dict[str, Any]], None], index: int = 0) -> None:
    """Changes one line of rows.jsonl, and writes the table again, so that only the rows tell."""
    path = folder / "rows.jsonl"
    lines = [json.loads(Row.from_json(line).to_json()) for line in path.read_text().splitlines()]
    change(lines[index])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "table.md").unlink()


def put(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(line: dict[str, Any]) -> None:
        for key in keys[:-1]:
            line = line[key]
        line[keys[-1]] = value

    return change


@pytest.mark.parametrize("name", sorted(path.parent.name for path in REFERENCE.glob("*/rows.jsonl")))
def test_a_reference_folder_agrees_with_its_samples(name: str) -> None:
    assert texts(REFERENCE / name) == []


def test_rows_of_older_rules_say_so() -> None:
    (note,) = (str(one) for one in audit(REFERENCE / "tiers_smollm2_cpu").findings)
    assert note.startswith("note: ") and "measured by the rules before: only what is stored can be checked" in note
    assert audit(REFERENCE / "default_smollm2_cpu").summary.startswith("9 rows: 9 judged again")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            put("payload", "kv_ttft_s", value=0.05),
            "the injected TTFT is stored as 0.05, and the timed calls give 0.07698",
        ),
        (put("payload", "build_s", value=0.1), "the build time is stored as 0.1"),
        (put("payload", "break_even_queries", value=0.5), "break even is stored as 0.5"),
        (put("payload", "speedup_pct", value=99.0), "the speed-up of 99% lies outside its interval, 64.78 to 72.01%"),
        (put("payload", "speedup_interval", value=[71.0, 71.1]), "the low end of its interval is stored as 71"),
        (
            put("payload", "kv_ttft_all_s", value=[0.07] * 6),
            "the list of injected TTFTs is not that of its timed calls",
        ),
        (put("payload", "baseline_ttft_s", value=9.0), "the TTFT of the baseline is stored as 9"),
        (put("payload", "spread", "direct", value=0.0), "the spread of the direct arm is stored as 0"),
        (put("payload", "evidence", "calls", value=[]), "its timed calls can't be judged"),
        (put("payload", "evidence", "tolerance", value=None), "the rules say invalid: the answers were not graded"),
        (put("verdict", value="undecided"), "the verdict is stored as undecided, and the rules say ok"),
        (put("verdict_reason", value="all is well"), "the verdict's reason is stored as 'all is well'"),
        (put("equality", value="near_tie"), "the equality is stored as near_tie, with no token that differs"),
        (put("logit_max_abs_diff", value=1.0), "the equality is stored as bitwise, with a logit 1 apart"),
        (put("conditions", "commit", value="0123456789ab"), "different values of commit: 0123456789ab in 1"),
        (put("conditions", "torch", value="1.0"), "different values of torch: 1.0 in 1"),
        (put("dtype", value="bfloat16"), "different values of dtype: bfloat16 in 1"),
        (put("payload", value=None), "it is no failed row, and has no figures"),
    ],
)
def test_an_edited_row_is_found(folder: Path, change: Callable[[dict[str, Any]], None], found: str) -> None:
    assert texts(folder) == []
    edit(folder, change)
    assert any(found in text for text in texts(folder)), texts(folder)


def test_an_invalid_cell_made_ok_is_found(folder: Path) -> None:
    """The direct arm had a hit, and the verdict was set to ok."""

    def change(line: dict[str, Any]) -> None:
        calls = line["payload"]["evidence"]["calls"]
        next(call for call in calls if call["arm"] == "direct")["cached_tokens"] = 256

    edit(folder, change)
    assert any("the verdict is stored as ok, and the rules say invalid: 256 tokens" in text for text in texts(folder))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (put("payload", "kv_ttft_s", value=0.01), "kv_ttft_s is stored as 0.01, and the samples give"),
        (put("payload", "speedup_pct", value=99.5), "lies outside its interval"),
        (put("payload", "speedup_pct", value=99.5), "the speed-up is stored as 99.5"),
        (put("payload", "break_even_queries", value=0.1), "break even is stored as 0.1"),
        (put("payload", "limit_s", value=3.0), "the verdict is stored as ok, and the injected arm took"),
        (put("payload", "build_s", value=0.01), "the direct baseline is too slow"),
        (put("pairs", value=500), "it says 500 pairs, and stores"),
    ],
)
def test_an_edited_row_of_older_rules_is_found(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], found: str
) -> None:
    older = Path(shutil.copytree(REFERENCE / "dialogue_smollm2_cpu", tmp_path / "run"))
    edit(older, change)
    assert any(found in text for text in texts(older)), texts(older)


def test_an_edited_sample_of_another_scenario_is_found(tmp_path: Path) -> None:
    tiers = Path(shutil.copytree(REFERENCE / "tiers_smollm2_cpu", tmp_path / "run"))
    edit(tiers, put("payload", "ttft_s", value=1e-4))
    assert any("ttft_s is stored as 0.0001, and the samples give" in text for text in texts(tiers))


def test_an_edited_table_is_found(folder: Path) -> None:
    table = folder / "table.md"
    table.write_text(table.read_text().replace("71.0%", "91.0%", 1))
    (text,) = texts(folder)
    assert "table.md: line 7 says" in text and "91.0%" in text and "71.0%" in text


def test_another_configuration_is_found(folder: Path) -> None:
    (folder / "DONE.json").write_text(json.dumps({"config_hash": "0" * 12, "cells": [], "finished": True}))
    (text,) = texts(folder)
    assert "config.yaml has the hash" in text


def test_a_line_that_is_cut_off_is_found(folder: Path) -> None:
    rows = folder / "rows.jsonl"
    rows.write_text(rows.read_text()[:-100])
    assert any("1 line could not be read" in text for text in texts(folder))


def test_the_exit_status_and_the_lines(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert verify.main([str(folder), str(REFERENCE / "storage_cpu")]) == 0
    assert capsys.readouterr().out.endswith("2 folders: everything agrees with the stored samples\n")
    edit(folder, put("verdict", value="invalid"))
    assert verify.main([str(folder.parent)]) == 1
    shown = capsys.readouterr().out
    assert "\n  differs: kv_vs_direct 0 256/32 injected: the verdict is stored as invalid" in shown
    assert shown.endswith("1 folder: 1 with differences\n")
    assert verify.main([str(tmp_path / "nothing")]) == 2
    assert "is no run" in capsys.readouterr().err


@GROUP
def test_a_new_run_agrees_in_table_page_and_wandb(measured: Path) -> None:
    checked = audit(measured)
    assert texts(measured) == []
    assert "compared with table.md, report.html, W&B's table of rows" in checked.summary


@GROUP
def test_an_edited_page_and_wandb_table_are_found(measured: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(measured, tmp_path / "elsewhere"))
    assert texts(folder) == []  # a run's folder may move
    page = folder / "report.html"
    page.write_text(page.read_text().replace(" ms</", "7 ms</", 1))
    (logged,) = (folder / "wandb").glob("offline-run-*/files/media/table/rows*.json")
    table = json.loads(logged.read_text())
    table["data"][1][table["columns"].index("kv_ttft_s")] /= 2
    logged.write_text(json.dumps(table))
    of_page, of_wandb = texts(folder)
    assert "report.html: line" in of_page and "W&B has kv_ttft_s" in of_wandb and "96/32" in of_wandb


@GROUP
def test_a_run_continued_by_another_commit_is_told(measured: Path, tmp_path: Path) -> None:
    shutil.copytree(measured, tmp_path / "run")
    rows, done = tmp_path / "run/rows.jsonl", tmp_path / "run/DONE.json"
    rows.write_text(rows.read_text().splitlines(keepends=True)[0])
    ledger = json.loads(done.read_text())
    done.write_text(json.dumps(ledger | {"cells": ledger["cells"][:1], "finished": False, "ended": False}))
    assert "were measured by commit one, and this is commit two" in run(tmp_path, "two")
    (text,) = texts(tmp_path / "run")
    assert "different values of commit: one in 1" in text and "two in 1" in text


@GROUP
def test_a_cell_is_measured_anew(measured: Path, tmp_path: Path) -> None:
    before = (measured / "rows.jsonl").read_bytes()
    found = [str(one) for one in measure_anew(measured, "96/32")]
    assert (measured / "rows.jsonl").read_bytes() == before
    assert any("speed-up" in text and "overlap" in text for text in found)
    assert any("direct TTFT" in text and "anew: the intervals" in text for text in found)  # on the same machine
    with pytest.raises(ConfigError, match="has no cell '7/7'"):
        measure_anew(measured, "7/7")
    elsewhere = Path(shutil.copytree(measured, tmp_path / "run"))
    edit(elsewhere, put("conditions", "machine", value="another"))
    found = [str(one) for one in measure_anew(elsewhere, "64/32")]
    assert any("measured on another, and this machine is" in text for text in found)
    assert not any("direct TTFT" in text for text in found)
