"""A page's heading counts all that a user waits for, says first where an output changed, and calls predictions so."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from experiments import run_experiment
from experiments.reporting import findings, html, tables
from experiments.results import Evidence, Row, TimedCall, labels, read_run, ttft_of
from tests.helpers.rows import failed_row, invalid_row, ttft_row

REFERENCE = Path(__file__).parents[3] / "outputs/reference"
SPEED = re.compile(r"sooner|less time|speed-up|times as fast", re.I)


def blend_row(**fields: object) -> Row:
    """Four memories merged in 178 ms, which no engine TTFT counts; engine TTFT is 14.8 × shorter, user TTFT 5.3 ×."""
    return ttft_row(
        **{
            "memories": 4,
            "merge": "CacheBlend",
            "equality": "diverged",
            "first_difference": 3,
            "kv_ttft_s": 0.1,
            "direct_ttft_s": 1.48,
            "merge_s": 0.178,
            "kv_user_ttft_s": 0.28,
            "direct_user_ttft_s": 1.484,
            "speedup_pct": 93.24,
            "speedup_interval": (92.8, 93.5),
            **fields,
        }
    )


def _page(rows: list[Row]) -> str:
    return html.render(rows, [])


def _heading(page: str) -> str:
    """The text of the page down to the first section, in one line."""
    body = page[page.index("<header>") : page.index("</header>")]
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def test_a_heading_over_changed_answers_says_so_before_it_speaks_of_speed() -> None:
    heading = _heading(_page([blend_row(), blend_row(context_tokens=1024)]))
    assert "The output changed" in heading and "in 2 of 2 valid cells" in heading
    said = SPEED.search(heading)
    assert said and heading.index("The answer changed") < said.start()
    assert "sooner" not in heading


def test_a_heading_counts_the_merge() -> None:
    heading = _heading(_page([blend_row(equality="tokens", first_difference=None)]))
    assert "First token 5.30× sooner" in heading and "81.1% less time to the first token, with merging" in heading
    assert "14.8×" not in heading and "93.2%" not in heading
    assert "direct 1.48 s injected 280 ms" in heading


def test_a_heading_prefers_cells_whose_output_agrees() -> None:
    heading = _heading(_page([blend_row(), ttft_row(512, 32, equality="tokens")]))
    assert heading.index("The answer changed, by more than rounding explains, in 1 of 2 valid cells.") < heading.index(
        "First token"
    )
    assert "the only valid cell whose output agrees up to rounding" in heading
    assert "5.30×" not in heading


@pytest.mark.parametrize(
    ("grade", "said"), [("drifted", "The logits changed"), ("near_tie", "A token flipped"), (None, "not compared")]
)
def test_a_heading_names_every_grade_that_is_not_the_same_output(grade: str | None, said: str) -> None:
    heading = _heading(_page([ttft_row(equality=grade)]))
    found = SPEED.search(heading)
    assert said in heading and found and heading.index(said) < found.start()


def test_invalid_and_undecided_cells_give_no_heading() -> None:
    for row in (invalid_row(), ttft_row(verdict="undecided"), failed_row()):
        heading = _heading(_page([row]))
        assert "No speed-up to show" in heading and "sooner" not in heading


def test_stored_calls_give_the_heading_its_paired_user_speed_up_and_interval() -> None:
    calls = [
        TimedCall(
            arm=arm,
            round=i,
            started_s=i + at,
            outer_s=user_s,
            user_s=user_s,
            engine_s=user_s / 2,
            token=1,
            prompt_tokens=544,
            digest="a",
        )
        for i in range(6)
        for arm, at, user_s in (("injected", 0.0, 0.1 * (i + 1)), ("direct", 0.5, 0.4 * (i + 1) + 0.01 * i))
    ]
    heading = _heading(_page([ttft_row(evidence=Evidence(calls=calls), rules=2)]))
    assert "75.4% less time to the first token (96.9% interval 75.0–75.5%)" in heading


def test_a_build_that_never_pays_is_counted() -> None:
    heading = _heading(_page([ttft_row(), ttft_row(1024, break_even_queries=None)]))
    assert "1.10 queries; never in 1 of 2 cells" in heading


def test_an_answer_tells_the_output_before_the_time() -> None:
    answer = findings.answer([blend_row(), ttft_row(512, 32)])
    assert answer.startswith("The answer is the same in 1 of 2 rows, 1 diverged. With an injected memory")
    assert "5.30 to" in answer and "with merging" in answer
    compressed = findings.answer(read_run(REFERENCE / "tiers_compressed_smollm2_cpu").rows)
    assert compressed.startswith("The answer is the same in 22 of 24 rows, 2 diverged. ")


def test_a_page_prints_no_object() -> None:
    row = ttft_row(evidence=Evidence())
    figures = ttft_of(row)
    assert figures is not None and "evidence" not in figures.figures()
    assert "Evidence(" not in _page([row])


def test_the_rows_of_one_cell_have_different_titles() -> None:
    rows = read_run(REFERENCE / "tiers_smollm2_cpu").rows[:4]
    titles = re.findall(r'<span class="name">(.*?)</span>', _page(rows))
    assert len(set(titles[:4])) == 4


def test_predictions_are_called_predictions(tmp_path: Path) -> None:
    rows = run_experiment("scenario=predict", "sink=none", out=tmp_path / "run")
    page = _page(rows)
    heading = _heading(page)
    assert "How long should the published cells take" in heading and "Predicted, not measured: 75 cells" in heading
    assert f"{len(rows)} predictions" in heading
    for wrong in ("No speed-up to show", "Measured on", "not judged", " 0 ok", "verdict that allows"):
        assert wrong not in page
    assert "Predicted for" in page
    assert labels.summary(rows) == f"{len(rows)} rows, predicted. Nothing was measured."
    assert "not judged" not in tables.markdown(rows)


def test_a_page_of_predictions_and_measurements_keeps_both_apart(tmp_path: Path) -> None:
    predicted = dataclasses.replace(ttft_row(verdict=None), backend="predicted", hardware="h800x4")
    page = _page([ttft_row(), predicted])
    facts = page[page.index("Measured on") : page.index("</dl>")]
    assert "huggingface" in facts and "h800x4" not in facts
