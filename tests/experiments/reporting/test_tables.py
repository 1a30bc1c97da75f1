"""The tables: golden Markdown, published rows beside ours, and figures that must not be shown."""

from __future__ import annotations

import dataclasses
import doctest
import io
from pathlib import Path

import pytest
from rich.console import Console

from experiments.reporting import tables
from experiments.results import formatting, labels, published, ttft_of
from kvmem.errors import ConfigError
from tests.helpers.rows import failed_row, grid, invalid_row, published_row, storage_row, ttft_row

GOLDEN = Path(__file__).with_name("golden")


def test_units_doctests():
    assert doctest.testmod(formatting).failed == 0


@pytest.mark.parametrize(
    "name, rows",
    [
        ("nine_cells", grid()),
        (
            "every_verdict",
            [
                ttft_row(equality="bitwise", logit_max_abs_diff=0.0),
                invalid_row(query_tokens=64),
                failed_row(),
                ttft_row(
                    merge="RopeShift",
                    memories=4,
                    equality="diverged",
                    first_difference=3,
                    verdict_reason="the answers diverge: the price of this merge",
                ),
            ],
        ),
        ("published_beside_ours", [published_row("long", "short"), published_row("short", "long"), storage_row()]),
    ],
)
def test_golden_table(name, rows):
    """Commit a deliberate change of a table as its new golden file, so that a reviewer sees both."""
    assert tables.markdown(rows) == (GOLDEN / f"{name}.md").read_text(encoding="utf-8")


def test_published_columns_come_first_and_in_order():
    columns = tables.tables(grid())[0].columns
    assert columns == (
        "Model",
        "Ctx",
        "CtxTok",
        "Qry",
        "QryTok",
        "Build",
        "KV TTFT",
        "Dir TTFT",
        "Speedup",
        "95% interval",
        "Equality",
        "Verdict",
        "Break even",
    )


@pytest.mark.parametrize(
    ("rules", "name"), [([2, 2], "96.9% interval"), ([0, 0], "95% interval"), ([0, 2], "Interval")]
)
def test_the_interval_is_named_by_what_it_holds(rules, name):
    rows = [dataclasses.replace(row, rules=version) for row, version in zip(grid(), rules, strict=False)]
    assert [column for column in tables.tables(rows)[0].columns if "nterval" in column] == [name]


@pytest.mark.parametrize("row", [invalid_row(), ttft_row(verdict=None), failed_row(payload=ttft_row().payload)])
def test_no_speedup_without_an_ok_verdict(row):
    line = tables.tables([row])[0].lines[0]
    shown = dict(zip(tables.tables([row])[0].columns, line.cells, strict=True))
    (interval,) = (name for name in shown if "nterval" in name)
    assert (shown["Speedup"], shown[interval], shown["Break even"]) == (formatting.NONE,) * 3
    assert line.speedup_pct is None


def test_published_row_stands_below_ours_with_hardware_not_stated():
    table = tables.tables([published_row("medium", "short")])[0]
    assert [line.kind for line in table.lines] == ["ok", "published"]
    theirs = dict(zip(table.columns, table.lines[1].cells, strict=True))
    assert (theirs["Build"], theirs["KV TTFT"], theirs["Dir TTFT"]) == ("430 ms", "100 ms", "950 ms")
    assert theirs["Speedup"] == "89.7%"
    assert "hardware not stated" in theirs["Verdict"]


def test_all_published_cells_are_read():
    by_table = {row.table for row in published.tables()}
    assert by_table == {path.stem for path in Path(published.__file__).parent.glob("*.csv")}
    vllm = published.beside("Qwen2.5-72B", "500", "1,000")
    assert {row.hardware for row in vllm} == {"4090 (2 Nodes 16 GPUs)", "H800 (4 GPUs)"}
    assert vllm[0].direct_ttft_s == pytest.approx(2.50626)


def test_a_new_published_table_is_found_by_itself(tmp_path):
    (tmp_path / "new.csv").write_text(
        "model,hardware,context,query,context_tokens,query_tokens,kv_ttft_ms,direct_ttft_ms,speedup_pct\n"
        "M,one GPU,long,short,100,10,5,50,90\n"
    )
    (row,) = published.tables(tmp_path)
    assert (row.table, row.kv_ttft_s, row.direct_ttft_s, row.hardware) == ("new", 0.005, 0.05, "one GPU")
    (tmp_path / "odd.csv").write_text("model,colour\nM,red\n")
    published.tables.cache_clear()
    with pytest.raises(ConfigError, match=r"odd\.csv"):
        published.tables(tmp_path)


def test_conditions_that_differ_are_columns_and_shared_ones_are_in_the_caption():
    rows = [ttft_row(), dataclasses.replace(ttft_row(), merge="RopeShift", memories=4)]
    table = tables.tables(rows)[0]
    assert "Merge" in table.columns and "Memories" in table.columns
    assert "merge" not in table.caption and "hardware cpu, 2 cores" in table.caption


def test_text_with_separators_stays_in_one_cell():
    text = tables.markdown([invalid_row(verdict_reason="a|b\n<script>")])
    (line,) = [line for line in text.splitlines() if "invalid:" in line]
    assert "a\\|b \\<script>" in line


def test_markdown_in_a_label_is_escaped():
    text = tables.markdown([ttft_row(model="[a](http://b) ~~c~~ &lt;")])
    assert "| \\[a](http://b) \\~\\~c\\~\\~ \\&lt; |" in text


def test_console_shows_every_figure_in_80_columns():
    console = Console(width=80, record=True, file=io.StringIO())
    rows = [*grid(), invalid_row(), failed_row()]
    console.print(tables.console_table(rows))
    text = console.export_text()
    for row in grid():
        figures = ttft_of(row)
        assert figures is not None
        for figure in (formatting.seconds(figures.kv_ttft_s), formatting.percent_range(figures.speedup_interval)):
            assert figure in text
    assert "direct is 1.9 ×" in text and "9000 tokens > 8192" in text
    assert labels.summary(rows) == (
        "11 rows: 9 ok, 1 invalid, 1 failed. Equality: 0 bitwise, 10 tokens, 0 near-tie, 0 diverged."
    )


def test_no_rows_give_an_empty_table():
    assert tables.tables([]) == []
    assert tables.markdown([]) == "0 rows: 0 ok, 0 invalid, 0 failed.\n"
