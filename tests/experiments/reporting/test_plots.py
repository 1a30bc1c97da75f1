"""The plots: written, not blank, and drawn from any rows."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from experiments.reporting import plots
from experiments.reporting.theme import DARK, LIGHT
from tests.helpers.rows import failed_row, grid, invalid_row, published_row, storage_row, ttft_row


def _has_color(path, color: str) -> bool:
    rgb = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).astype(int)
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return bool((np.abs(rgb - wanted).max(axis=1) < 3).sum() > 50)


DIALOGUE = [ttft_row(100 + 40 * turn, 17 + 3 * turn, context_label=f"turn {turn}") for turn in range(8)]
WITH_GAPS = [ttft_row(limit_s=None, direct_limit_s=None, kv_ttft_all_s=[]), ttft_row(1024, kv_ttft_p90_s=None)]
NOT_OK = [invalid_row(), failed_row(query_tokens=64)]


@pytest.mark.parametrize(
    "rows",
    [grid(), [ttft_row()], [*grid(), published_row()], NOT_OK, DIALOGUE, WITH_GAPS],
    ids=["grid", "one", "two models", "invalid and failed", "dialogue", "gaps"],
)
def test_plots_show_the_injected_arm(rows, tmp_path):
    ttft, speedup = plots.write_plots(rows, tmp_path / "plots")
    assert (ttft.name, speedup.name) == ("ttft.png", "speedup.png")
    assert _has_color(ttft, LIGHT.injected) and _has_color(ttft, LIGHT.direct)
    assert len(np.unique(np.asarray(Image.open(speedup).convert("L")))) > 10


def test_rows_without_a_ttft_have_no_plots(tmp_path):
    assert plots.write_plots([storage_row(), failed_row()], tmp_path / "plots") == []
    assert plots.write_plots([], tmp_path / "plots") == []


def test_each_query_length_has_a_panel():
    titles = [axes.get_title("left") for axes in plots.draw(grid())["ttft"].axes]
    assert titles == ["32-token query", "64-token query", "128-token query"]


def test_the_heat_map_gives_the_reason_for_a_missing_speedup():
    rows = grid()
    rows[0], rows[1] = invalid_row(context_tokens=256), failed_row(context_tokens=256, query_tokens=64)
    texts = [text.get_text() for text in plots.draw(rows)["speedup"].axes[0].texts]
    assert texts[:2] == ["invalid", "failed"]
    assert texts[-1] == "83.9%\n6.20×"
    slower = ttft_row(speedup_pct=-5.0)
    assert plots.draw([slower])["speedup"].axes[0].texts[0].get_text() == "−5.0%"


@pytest.mark.parametrize("text", ["costs $x^{ and $y", "$\\frac$"])
def test_labels_are_text_not_formulas(text, tmp_path):
    rows = [ttft_row(model=text, context_label=text, query_label=text), ttft_row(128, model=text)]
    assert len(plots.write_plots(rows, tmp_path)) == 2
    assert text.encode() in plots.svg(plots.draw(rows)["speedup"], LIGHT)


def test_svg_is_reproducible_and_follows_the_theme():
    first, again = (plots.svg(plots.draw(grid(), DARK)["ttft"], DARK) for _ in range(2))
    assert first == again
    assert DARK.injected.encode() in first and LIGHT.injected.encode() not in first
