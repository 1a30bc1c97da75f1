"""Sequences of uses and edits of memories: families to draw from, a file format, and a simulator."""

from experiments.traces.base import FAMILIES, Event, Trace, TraceFamily, zipf_shares
from experiments.traces.simulator import Outcome, best_oracle, bound_s, simulate

__all__ = ["FAMILIES", "Event", "Outcome", "Trace", "TraceFamily", "best_oracle", "bound_s", "simulate", "zipf_shares"]
