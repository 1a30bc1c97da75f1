"""The report: of one run, of several runs, and of a killed run; and the page in a real browser."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from markupsafe import escape

from experiments import report
from experiments.reporting import findings
from experiments.results import Row, formatting, ttft_of
from kvmem.errors import ConfigError
from tests.helpers.rows import failed_row, grid, invalid_row, published_row, storage_row, ttft_row


def _run(folder: Path, rows: list[Row], tail: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(row.to_json() + "\n" for row in rows) + tail)
    return folder


def test_a_run_gets_table_plots_and_page(tmp_path):
    run = _run(tmp_path / "a", [*grid(), invalid_row(), failed_row()])
    (run / "config.yaml").write_text("model: {label: <SmolLM2>}\n")
    (run / "environment.json").write_text('{"machine": "two cores"}')
    assert report.write_report(run) == run / "report.html"
    assert (run / "table.md").read_text().count("SmolLM2") == 11
    assert (run / "plots" / "ttft.png").stat().st_size > 10_000
    page = (run / "report.html").read_text()
    assert "two cores" in page and "&lt;SmolLM2&gt;" in page
    assert str(escape(failed_row().error)) in page


def test_joined_runs_name_the_run_of_each_row(tmp_path):
    runs = [_run(tmp_path / "day" / "one", grid()), _run(tmp_path / "day" / "two", [published_row(), storage_row()])]
    out = tmp_path / "joined"
    assert report.main([*map(str, runs), "--out", str(out)]) == 0
    table = (out / "table.md").read_text()
    assert table.count("day/one") == 9 and table.count("| day/two") == 1
    assert "### storage" in table
    assert "15 rows" not in table and "11 rows: 11 ok" in table


def test_joined_runs_whose_paths_end_alike_have_different_names(tmp_path):
    runs = [_run(tmp_path / machine / "sweep" / "0", grid()[:1]) for machine in ("one", "two")]
    table = report.write_joined(runs, tmp_path / "joined").with_name("table.md").read_text()
    assert table.count("one/sweep/0") == table.count("two/sweep/0") == 1


def test_a_killed_run_keeps_its_rows_and_counts_the_truncated_line(tmp_path):
    run = _run(tmp_path / "a", grid()[:4], tail=ttft_row().to_json()[:300])
    assert len(report.read_run(run).rows) == 4
    page = report.write_report(run).read_text()
    assert "1 line of rows.jsonl could not be read and is left out" in page


def test_a_run_killed_before_its_first_row_has_an_empty_report(tmp_path):
    assert "No row yet" in report.write_report(_run(tmp_path / "a", [])).read_text()


def test_rows_without_a_speed_up_are_headed_by_their_question(tmp_path):
    page = report.write_report(_run(tmp_path / "a", [storage_row()])).read_text()
    assert re.search(r"<h1[^>]*>What do dump and load cost", page)
    unjudged = replace(storage_row(), verdict=None)
    assert re.search(r"<h1[^>]*>No speed-up to show", report.write_report(_run(tmp_path / "b", [unjudged])).read_text())


def test_a_folder_without_rows_is_a_clear_error(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "is no run: it has no rows.jsonl" in capsys.readouterr().err


def test_rows_of_another_version_are_refused(tmp_path):
    for number, change in enumerate(
        [('"merge"', '"blend"'), ('"build_s"', '"built_s"'), ('"version": 2', '"version": 3')]
    ):
        run = _run(tmp_path / str(number), [], tail=ttft_row().to_json().replace(*change) + "\n")
        with pytest.raises(ConfigError, match="line 1, was written by another version"):
            report.read_run(run)


def test_rows_of_an_unknown_scenario_are_refused(tmp_path):
    """The name in a row is looked up among the scenarios, never imported as a module."""
    run = _run(tmp_path / "a", [replace(storage_row(), scenario="os.path")])
    with pytest.raises(ConfigError, match=r"Unknown scenario 'os\.path'"):
        report.read_run(run)


def test_log_sends_rows_to_wandb_offline(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("CACHE", "DATA", "CONFIG", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb"))
    run = _run(tmp_path / "a", grid()[:2])
    assert report.main([str(run), "--log"]) == 0
    assert "W&B run" in capsys.readouterr().out
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))


def test_page_escapes_the_text_of_models_and_files(tmp_path):
    evil = "</p><script>alert(1)</script>"
    answers = {"injected": evil, "direct": evil}
    row = ttft_row(model=evil, verdict_reason=evil, question=evil, answers=answers)
    page = report.write_report(_run(tmp_path / "a", [row, failed_row(error=evil)])).read_text()
    assert "<script" not in page and str(escape(evil)) in page


def test_page_makes_no_requests(tmp_path):
    page = report.write_report(_run(tmp_path / "a", grid())).read_text()
    sources = re.findall(r'(?:src|srcset|href)="([^"]{0,20})', page)
    assert sources and all(source.startswith("data:") for source in sources)
    assert "@import" not in page and "url(" not in page


@pytest.fixture
def browser():
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium and chromedriver on the PATH (Debian: chromium, chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield session
    session.quit()


def test_page_in_a_browser(tmp_path, browser):
    rows = [*grid(), invalid_row(query_tokens=96), published_row(), storage_row(), failed_row()]
    browser.get(report.write_report(_run(tmp_path / "a", rows)).as_uri())
    assert browser.get_log("browser") == []
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []
    images = browser.execute_script("return [...document.images].map(image => image.naturalWidth > 100)")
    assert images == [True, True]

    text = browser.execute_script("return document.body.textContent")
    for row in rows[:11]:
        of = ttft_of(row)
        assert of is not None
        figures = [formatting.seconds(time) for time in (of.build_s, of.kv_ttft_s, of.direct_ttft_s, of.kv_user_ttft_s)]
        figures += [formatting.percent_range(of.speedup_interval)] * (row.verdict == "ok")
        assert [figure for figure in figures if figure not in text] == []
    assert "310 ms" in text and "9000 tokens > 8192" in text and "direct is 1.9 ×" in text
    hidden = ttft_of(invalid_row(query_tokens=96))
    assert hidden is not None and formatting.percent(hidden.speedup_pct) not in text

    for width in (1280, 390):  # only tables and plots scroll sideways, each in its own box
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    grounds = set()
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        grounds.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2


def test_a_run_without_a_complete_row_keeps_its_table_and_is_an_error(tmp_path, capsys):
    run = _run(tmp_path / "a", [], tail=ttft_row().to_json()[:300])
    (run / "table.md").write_text("as it was")
    assert report.main([str(run)]) == 2
    assert "rows.jsonl holds no complete row" in capsys.readouterr().err
    assert (run / "table.md").read_text() == "as it was"


def test_an_output_folder_that_cannot_be_written_is_an_error_of_one_line(tmp_path, capsys):
    run = _run(tmp_path / "a", grid())
    (tmp_path / "file").write_text("")
    assert report.main([str(run), "--out", str(tmp_path / "file" / "below")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        (
            "injection_cost_qwen3_32b_h200",
            "1.32 to 1.78 × this machine's shortest possible time, 0.706 to 0.939 × vLLM",
        ),
        ("injection_cost_qwen3_32b_h200", "the same memory as prompt text takes 1.58 to 23.9 × as long."),
        ("tiers_qwen3_8b_h100", "tier: ram (0.975 to 1.09), disk, warm (1.55 to 2.65)"),
        ("storage_cpu", "dump takes 0.685 × torch.save's time, load 0.126 × torch.load's."),
        ("reuse_trace_smollm2_cpu", "benefit_per_byte saves 67.6 to 86.1%"),
        (
            "default_smollm2_cpu",
            "The answer is the same in 9 of 9 rows. With an injected memory the first token comes 2.26 to 9.98 times",
        ),
        ("prefix_reuse_qwen3_8b_h100", ""),
    ],
)
def test_a_scenario_answers_its_question_in_a_sentence(name, answer):
    rows = report.read_run(Path(__file__).parents[3] / "outputs/reference" / name).rows
    sentence = findings.answer(rows)
    assert answer in sentence and bool(answer) == bool(sentence)


def test_a_report_is_written_where_the_row_that_an_answer_needs_is_invalid():
    """Makes each arm's row invalid in turn: the report then has no answer, or a shorter one."""
    for name in ("injection_cost_qwen3_32b_h200", "tiers_qwen3_8b_h100", "storage_cpu", "reuse_trace_smollm2_cpu"):
        rows = report.read_run(Path(__file__).parents[3] / "outputs/reference" / name).rows
        for arm in dict.fromkeys(row.arm for row in rows):
            judged = [replace(row, verdict="invalid") if row.arm == arm else row for row in rows]
            assert "nan" not in findings.answer(judged)
