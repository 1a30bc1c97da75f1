"""The example in examples/: it learns which text it needs, and is then faster than the prompt as text."""

from __future__ import annotations

import io
import re
import runpy
import sys
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "faq_assistant.py"
LINE = re.compile(r"\[(\w+) as (text|KV): (\d+) ms, without memory: (\d+) ms\]")


def test_the_faq_assistant_gets_faster_as_it_learns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (ROOT / "examples/faq_questions.txt").read_text().splitlines()
    questions = "\n".join(lines[:3] + lines[4:6])  # only those about repairs, because each takes seconds
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(ROOT / "examples/faq")])
    monkeypatch.setattr(sys, "stdin", io.StringIO(questions))
    runpy.run_path(str(EXAMPLE), run_name="__main__")  # in this process, because imports are half of a short run
    printed = capsys.readouterr().out
    answers = [(text, form, int(ms), int(direct_ms)) for text, form, ms, direct_ms in LINE.findall(printed)]
    assert len(answers) == len(questions.splitlines()) and "59 euros" in printed
    of_repairs = [form for text, form, _, _ in answers if text == "repairs"]
    assert of_repairs[0] == "text" and of_repairs[-1] == "KV", "nothing is kept before it was used"
    assert of_repairs == sorted(of_repairs, key=["text", "KV"].index), "and what is hot stays"
    hits = [(ms, direct_ms) for _, form, ms, direct_ms in answers if form == "KV"]
    assert len(hits) >= 3 and median(ms / direct_ms for ms, direct_ms in hits) < 0.6
