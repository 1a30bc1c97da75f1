"""The heading of a page whose rows have speed-ups.

It counts all that a user waits for, and says that an output changed before it speaks of speed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.measurement import statistics
from experiments.results import CHANGED, Row, formatting, user_calls, user_speedup


@dataclass(frozen=True)
class Headline:
    """`factor` is the part of the title that is set off: "14.8×". `row` is the cell that the title speaks of."""

    output: str
    """What is said before anything else: where the output is not the same. "" if it is the same everywhere."""
    title: str
    factor: str
    after: str
    row: Row
    pct: float
    interval: tuple[float, float] | None
    of: str
    """Which cells `row` is the best of."""
    changed: bool
    """Whether the output of `row` changed."""
    all_pct: tuple[float, float] | None
    """The least and the largest user speed-up of the cells with the same output; None if there is none."""


def headline(rows: Sequence[Row]) -> Headline | None:
    """None if no row has a speed-up that may be shown."""
    valid = sorted(((pct, row) for row in rows if (pct := user_speedup(row)) is not None), key=lambda pair: pair[0])
    if not valid:
        return None
    kept = [pair for pair in valid if pair[1].equality not in CHANGED]
    pct, row = (kept or valid)[-1]
    factor, title, after = "", "No cell is faster injected", ""
    if not kept:
        title = "The output changed"
    elif 0 < pct < 100:
        title, factor, after = "First token", formatting.times(100 / (100 - pct)), "sooner"
    among = len(kept or valid)
    agreeing = " whose output agrees up to rounding" if kept and len(kept) < len(valid) else ""
    of = f"the only valid cell{agreeing}" if among == 1 else f"the best of {among} valid cells{agreeing}"
    return Headline(
        output=_output([row for _, row in valid]),
        title=title,
        factor=factor,
        after=after,
        row=row,
        pct=pct,
        interval=statistics.speedup_interval(*user_calls(row)),
        of=of,
        changed=not kept,
        all_pct=(kept[0][0], kept[-1][0]) if kept else None,
    )


def _output(valid: Sequence[Row]) -> str:
    grades = Counter(row.equality for row in valid)
    said = {
        "drifted": "the logits changed, by more than rounding explains, in",
        "diverged": "the answer changed, by more than rounding explains, in",
        "near_tie": "a token flipped where rounding alone decides, in",
        None: "the output was not compared in",
    }
    found = [f"{text} {grades[grade]} of {len(valid)}" for grade, text in said.items() if grades[grade]]
    if not found:
        return ""
    line = "; ".join(found) + f" valid {'cell' if len(valid) == 1 else 'cells'}."
    return line[0].upper() + line[1:]
