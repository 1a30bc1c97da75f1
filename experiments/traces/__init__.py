"""Sequences of uses and edits of memories: families to draw from, file formats, arrival times, and a simulator."""

from experiments.traces.arrivals import NO_MEMORY, ArrivalPlan, read_arrivals
from experiments.traces.base import FAMILIES, Event, Trace, TraceFamily, zipf_shares
from experiments.traces.simulator import Outcome, best_oracle, bound_s, simulate

__all__ = [
    "FAMILIES",
    "NO_MEMORY",
    "ArrivalPlan",
    "Event",
    "Outcome",
    "Trace",
    "TraceFamily",
    "best_oracle",
    "bound_s",
    "read_arrivals",
    "simulate",
    "zipf_shares",
]
