"""Rows, the folder of a run, their wording, and the published figures."""

from experiments.results.arms import ALONE, DIRECT, DIRECT_EAGER, GRAPH, IN_PLACE
from experiments.results.formatting import between
from experiments.results.labels import (
    GRADES,
    PREDICTED,
    Kind,
    Label,
    caption,
    condition,
    equality,
    is_prediction,
    kind,
    label,
    shown_speedup,
    summary,
    varying,
    verdict,
)
from experiments.results.provenance import SHARED_CONDITIONS, different_conditions, measured_rows
from experiments.results.row import PAYLOADS, Payload, Row, TimedPrefill
from experiments.results.run_dir import ROWS_FILE, SWEEPS, Run, displayed_path, in_order, read_rows, read_run, runs_in
from experiments.results.ttft import AnswerPayload, ArmTimes, Evidence, TimedCall, TTFTPayload, ttft_of
from experiments.results.user_speedup import CHANGED, SAME, user_calls, user_speedup

__all__ = [
    "ALONE",
    "CHANGED",
    "DIRECT",
    "DIRECT_EAGER",
    "GRADES",
    "GRAPH",
    "IN_PLACE",
    "PAYLOADS",
    "PREDICTED",
    "ROWS_FILE",
    "SHARED_CONDITIONS",
    "SAME",
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
    "different_conditions",
    "displayed_path",
    "equality",
    "in_order",
    "is_prediction",
    "kind",
    "label",
    "measured_rows",
    "read_rows",
    "read_run",
    "runs_in",
    "shown_speedup",
    "summary",
    "ttft_of",
    "user_calls",
    "user_speedup",
    "varying",
    "verdict",
]
