"""One measured cell: its fields are the columns of every table, plot and sink."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cell of one scenario. Times in seconds, sizes in bytes, lengths in tokens; None: not measured.

    Engine TTFT (`kv_ttft_s`, `direct_ttft_s`) runs from token ids ready to the first token id on the host; user TTFT
    from text to the same point. Medians over `pairs` interleaved pairs. `extra` holds what one scenario adds, among
    them the labels of the published tables ("context": "long") and the two answers.
    """

    model: str
    weights: str
    dtype: str
    backend: str
    attention: str
    hardware: str
    scenario: str
    merge: str
    tier: str
    arm: str
    context_tokens: int
    query_tokens: int
    memories: int = 1
    pairs: int = 0
    build_s: float | None = None
    kv_bytes: int | None = None
    fetch_s: float | None = None
    merge_s: float | None = None
    kv_ttft_s: float | None = None
    direct_ttft_s: float | None = None
    kv_user_ttft_s: float | None = None
    direct_user_ttft_s: float | None = None
    speedup_pct: float | None = None
    """100 × (1 − injected / direct), engine TTFT."""
    speedup_interval: tuple[float, float] | None = None
    """95% bootstrap interval of speedup_pct over the pairs."""
    break_even_queries: float | None = None
    """After how many queries the build has paid for itself: build_s over the user TTFT saved; None: never."""
    cached_tokens: int | None = None
    limit_s: float | None = None
    """The roofline's least time for the injected arm; the direct arm's is extra["direct_limit_s"]."""
    mfu: float | None = None
    """Model FLOPs utilisation of the injected arm: FLOP / (kv_ttft_s × the chip's calibrated rate)."""
    equality: str | None = None
    """bitwise, tokens, near_tie or diverged."""
    first_difference: int | None = None
    """Index of the first greedy token that differs."""
    logit_max_abs_diff: float | None = None
    near_tie_margin: float | None = None
    verdict: str | None = None
    """ok or invalid."""
    verdict_reason: str = ""
    status: str = "done"
    """done or failed."""
    error: str = ""
    """The traceback of a failed cell."""
    conditions: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Row:
        fields = json.loads(line)
        if fields.get("speedup_interval") is not None:
            fields["speedup_interval"] = tuple(fields["speedup_interval"])
        return cls(**fields)
