"""The example in examples/: it learns which text it needs, and is then faster than the prompt as text."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "faq_assistant.py"
LINE = re.compile(r"\[(\w+) as (text|KV): (\d+) ms, without memory: (\d+) ms\]")


def test_the_faq_assistant_gets_faster_as_it_learns() -> None:
    questions = (ROOT / "examples/faq_questions.txt").read_text()
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(ROOT / "examples/faq")], input=questions, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True,
    )  # fmt: skip
    told = [(text, place, int(ms), int(direct_ms)) for text, place, ms, direct_ms in LINE.findall(done.stdout)]
    assert len(told) == len(questions.splitlines()) and "59 euros" in done.stdout
    of_repairs = [place for text, place, _, _ in told if text == "repairs"]
    assert of_repairs[0] == "text" and of_repairs[-1] == "KV", "nothing is built before it was used"
    assert of_repairs == sorted(of_repairs, key=["text", "KV"].index), "and what is hot stays"
    hits = [(ms, direct_ms) for _, place, ms, direct_ms in told if place == "KV"]
    assert len(hits) >= 3 and median(ms / direct_ms for ms, direct_ms in hits) < 0.6


def test_it_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 60
