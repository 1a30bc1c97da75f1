"""Rows, the folder of a run, their wording, and the published figures."""

from experiments.results.arms import ALONE, DIRECT, DIRECT_EAGER, GRAPH, IN_PLACE
from experiments.results.formatting import between
from experiments.results.labels import (
    GRADES,
    Kind,
    Label,
    caption,
    condition,
    equality,
    kind,
    label,
    shown_speedup,
    summary,
    varying,
    verdict,
)
from experiments.results.row import PAYLOADS, Payload, Row, TimedPrefill
from experiments.results.run_dir import ROWS_FILE, SWEEPS, Run, displayed_path, in_order, read_rows, read_run, runs_in
from experiments.results.ttft import AnswerPayload, ArmTimes, Evidence, TimedCall, TTFTPayload, ttft_of

__all__ = [
    "ALONE",
    "DIRECT",
    "DIRECT_EAGER",
    "GRADES",
    "GRAPH",
    "IN_PLACE",
    "PAYLOADS",
    "ROWS_FILE",
    "SWEEPS",
    "AnswerPayload",
    "ArmTimes",
    "Evidence",
    "Kind",
    "Label",
    "Payload",
    "Row",
    "Run",
    "TTFTPayload",
    "TimedCall",
    "TimedPrefill",
    "between",
    "caption",
    "condition",
    "displayed_path",
    "equality",
    "in_order",
    "kind",
    "label",
    "read_rows",
    "read_run",
    "runs_in",
    "shown_speedup",
    "summary",
    "ttft_of",
    "varying",
    "verdict",
]
