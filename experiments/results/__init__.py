"""Rows, the folder of a run, their wording, and the published figures."""

from experiments.results.arms import ALONE, DIRECT, DIRECT_EAGER, GRAPH, IN_PLACE, INJECTION_COST
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
from experiments.results.row import Row
from experiments.results.run_dir import ROWS_FILE, SWEEPS, Run, displayed_path, in_order, read_rows, read_run, runs_in

__all__ = [
    "ALONE",
    "DIRECT",
    "DIRECT_EAGER",
    "GRADES",
    "GRAPH",
    "INJECTION_COST",
    "IN_PLACE",
    "ROWS_FILE",
    "SWEEPS",
    "Kind",
    "Label",
    "Row",
    "Run",
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
    "varying",
    "verdict",
]
