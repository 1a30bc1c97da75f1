"""Rows are read back as they were written, and those of version 1 without a loss."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from experiments.reporting import tables
from experiments.results import PAYLOADS, Row, read_run
from experiments.results.version1 import DUPLICATES
from experiments.scenarios import SCENARIOS
from tests.helpers.rows import failed_row, invalid_row, storage_row, ttft_row

REFERENCE = sorted(path.parent for path in (Path(__file__).parents[3] / "outputs/reference").glob("*/rows.jsonl"))


@pytest.mark.parametrize("row", [ttft_row(), invalid_row(memories=4), failed_row(), storage_row()])
def test_a_row_is_read_back_as_it_was_written(row: Row) -> None:
    line = row.to_json()
    assert json.loads(line)["version"] == 2
    assert Row.from_json(line) == row


@pytest.mark.parametrize("run_dir", REFERENCE, ids=lambda path: path.name)
def test_the_reference_rows_lose_no_figure_and_render_the_committed_table(run_dir: Path) -> None:
    run = read_run(run_dir)
    lines = [json.loads(line) for line in (run_dir / "rows.jsonl").read_text().splitlines()]
    assert run.unread_lines == 0 and len(run.rows) == len(lines)
    for row, old in zip(run.rows, lines, strict=True):
        assert Row.from_json(row.to_json()) == row
        if "version" in old:
            continue
        assert row.payload is not None
        now: dict[str, Any] = json.loads(row.to_json())
        now |= now.pop("payload")
        labels = {"context": "context_label", "query": "query_label"}
        extra = {labels.get(key, key): value for key, value in old.pop("extra").items() if key not in DUPLICATES}
        for key, value in (old | extra).items():
            if value is not None:
                assert now[key] == value, key
    assert tables.markdown(run.rows) == (run_dir / "table.md").read_text(encoding="utf-8")


def test_every_scenario_has_a_payload_of_its_name_and_a_question() -> None:
    payloads = PAYLOADS.classes()
    for name, scenario in SCENARIOS.classes().items():
        assert name in payloads and payloads[name].__module__ == scenario.__module__
        assert scenario.question.endswith("?")


def test_the_columns_of_a_payload_are_fields_of_it_or_of_the_row() -> None:
    row_fields = {field.name for field in dataclasses.fields(Row)}
    for payload in PAYLOADS.classes().values():
        known = row_fields | {field.name for field in dataclasses.fields(payload)} | set(vars(payload))
        assert set(payload.columns) <= known, payload.name
