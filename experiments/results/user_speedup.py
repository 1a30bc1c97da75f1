"""The speed-up as a user sees it: from text to the first token, with tokenising, fetching and merging."""

from __future__ import annotations

from statistics import median

from experiments.results.labels import kind
from experiments.results.row import Row
from experiments.results.ttft import ttft_of

SAME = ("bitwise", "tokens")
"""Grades of answers whose tokens are equal and whose logits differ by no more than rounding."""
CHANGED = ("drifted", "diverged")
"""Grades of outputs that rounding does not explain."""


def user_calls(row: Row) -> tuple[list[float], list[float]]:
    """User TTFT of the injected and the direct arm by round, in seconds; without stored calls one median each.

    Empty lists for rows without TTFTs.
    """
    figures = ttft_of(row)
    if figures is None:
        return [], []
    if figures.evidence is None or not figures.evidence.calls:
        return [figures.kv_user_ttft_s], [figures.direct_user_ttft_s]
    calls = sorted(figures.evidence.calls, key=lambda call: call.round)
    kv_s = [call.user_s for call in calls if call.arm == row.arm]
    return kv_s, [call.user_s for call in calls if call.arm == figures.evidence.direct_arm]


def user_speedup(row: Row) -> float | None:
    """100 × (1 − the median of injected / direct user TTFT over the pairs), if the verdict is ok."""
    kv_s, direct_s = user_calls(row)
    if not kv_s or kind(row) != "ok":
        return None
    return 100 * (1 - median(kv / direct for kv, direct in zip(kv_s, direct_s, strict=True)))
