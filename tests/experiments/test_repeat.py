"""Repeats of a run, and the spread of its figures between runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import repeat, verify
from experiments.audit import audit
from experiments.config.compose import CONF
from experiments.execution import run_experiment
from experiments.hardware import layout
from experiments.reporting import between_runs, write_report
from experiments.results import SHARED_CONDITIONS
from kvmem.errors import ConfigError

REFERENCE = CONF.parent / "outputs/reference/default_smollm2_cpu"


def copies(folder: Path, change: Callable[[dict[str, Any], int], None]) -> Path:
    """A stored run and two repeats; `change` edits the first row of each repeat, told by its number."""
    without = shutil.ignore_patterns(between_runs.REPEATS, between_runs.FILE)
    run = Path(shutil.copytree(REFERENCE, folder / "run", ignore=without))
    for number in (2, 3):
        repeat_dir = run / between_runs.REPEATS / str(number)
        path = Path(shutil.copytree(REFERENCE, repeat_dir, ignore=without)) / "rows.jsonl"
        first, *others = path.read_text().splitlines()
        row = json.loads(first)
        change(row, number)
        path.write_text("\n".join([json.dumps(row), *others]) + "\n")
    return run


def cells_of(run: Path, line: int = 0) -> list[str]:
    return [cell.strip() for cell in between_runs.markdown(run).splitlines()[6 + line].strip("|").split("|")]


def test_the_spread_is_that_of_the_runs_medians(tmp_path: Path) -> None:
    def change(row: dict[str, Any], number: int) -> None:
        row["payload"] |= {"kv_ttft_s": 0.1 * number, "direct_ttft_s": 0.5, "speedup_pct": 10.0 * number}

    run = copies(tmp_path, change)
    row = json.loads((run / "rows.jsonl").read_text().splitlines()[0])["payload"]
    low, high = min(row["kv_ttft_s"], 0.2), 0.3
    told = cells_of(run)
    assert told[1] == "3 of 3"
    assert told[4] == f"{100 * (high - low) / 0.2:.1f}%"
    assert told[2] == f"20.0–{row['speedup_pct']:.1f}%"
    assert cells_of(run, line=1)[4] == "0.0%", "the other rows are equal"


def test_the_page_tells_the_spread_and_an_audit_computes_it_again(tmp_path: Path) -> None:
    def change(row: dict[str, Any], number: int) -> None:
        row["payload"]["kv_ttft_s"] = 0.1 * number

    run = copies(tmp_path, change)
    page = write_report(run)
    spread = cells_of(run)[4]
    text = page.read_text()
    assert "<h2>Between runs</h2>" in text and f"<td>{spread}</td>" in text
    page.write_text(text.replace(f"<td>{spread}</td>", "<td>0.1%</td>"))
    assert any("report.html" in finding.where and spread in finding.text for finding in audit(run).findings)
    shutil.rmtree(run / between_runs.REPEATS / "3")
    assert "Between runs" not in write_report(run).read_text(), "two runs tell no spread"


def test_intervals_that_hold_no_common_value_are_told(tmp_path: Path) -> None:
    def change(row: dict[str, Any], number: int) -> None:
        row["payload"]["speedup_interval"] = [number * 1.0, number + 0.5]

    run = copies(tmp_path, change)
    assert cells_of(run)[7].startswith("do not overlap") and cells_of(run, line=1)[7] == "overlap"


def test_a_cell_that_is_not_ok_in_three_runs_has_no_spread(tmp_path: Path) -> None:
    run = copies(tmp_path, lambda row, number: row.update(verdict="undecided"))
    assert cells_of(run)[1:4] == ["1 of 3", "–", "–"]
    shutil.rmtree(run / between_runs.REPEATS / "3")
    with pytest.raises(ConfigError, match="has 1 repeat, and a spread"):
        between_runs.markdown(run)


def test_another_machine_or_commit_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(REFERENCE, tmp_path / "run"))
    assert repeat.main([str(run)]) == 2
    assert "was measured with commit=" in capsys.readouterr().err
    assert repeat.main([str(run), "--runs", "2"]) == 2 and repeat.main([str(tmp_path)]) == 2
    assert not (run / between_runs.REPEATS).exists()


def test_an_audit_finds_copied_runs_and_other_commits(tmp_path: Path) -> None:
    def change(row: dict[str, Any], number: int) -> None:
        row["conditions"]["commit"] = "another" if number == 3 else row["conditions"]["commit"]

    run = copies(tmp_path, change)
    (run / between_runs.FILE).write_text(between_runs.markdown(run))
    told = [str(finding) for finding in audit(run).findings if between_runs.FILE in str(finding)]
    assert len(told) == 2, told
    assert "repeat 3 have different values of commit" in told[0] and "one was copied" in told[1]


def test_overrides_that_give_another_run_now_are_refused_before_a_model_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copies(tmp_path, lambda row, number: None)
    here = layout.conditions()
    lines = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
    for line in lines:
        line["conditions"] |= {name: here.get(name) for name in SHARED_CONDITIONS}
    (run / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(environment | {"overrides": ["sink=none", "seed=1"]}))
    shutil.rmtree(run / between_runs.REPEATS)
    assert repeat.main([str(run)]) == 2
    assert "don't give its config.yaml" in capsys.readouterr().err and not (run / between_runs.REPEATS).exists()


@pytest.mark.slow
def test_a_run_is_repeated_in_processes_of_their_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    cell = ("workload.query_tokens=[32]", "workload.context_tokens=[64]", "scenario.answer_tokens=2")
    run_experiment("model=tiny", "sink=none", "hardware.check=false", *cell, out=run)
    assert repeat.main([str(run)]) == 0
    (line,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("| 64/32")]
    assert "of 3" in line
    writers = [(path / "WRITER").read_text() for path in between_runs.repeats_of(run)]
    assert len(set(writers)) == 2, "two processes"
    assert verify.main([str(run)]) == 0 and "3 folders: everything agrees" in capfd.readouterr().out
    assert repeat.main([str(run)]) == 0, "finished repeats are not measured again"
    assert [(path / "WRITER").read_text() for path in between_runs.repeats_of(run)] == writers
    table = run / between_runs.FILE
    table.write_text(table.read_text().replace("of 3", "of 4"))
    assert verify.main([str(run)]) == 1 and between_runs.FILE in capfd.readouterr().out
