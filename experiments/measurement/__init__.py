"""Timing, output equality and the verdict: how one figure is taken and judged."""

from experiments.measurement.consensus import agreed
from experiments.measurement.equality import Equality, Trace, grade
from experiments.measurement.host_to_device import transfer_s
from experiments.measurement.ttft import Sample, synchronize
from experiments.measurement.verdict import MAX_DIRECT_RATIO, validate_cell

__all__ = [
    "MAX_DIRECT_RATIO",
    "Equality",
    "Sample",
    "Trace",
    "agreed",
    "grade",
    "synchronize",
    "transfer_s",
    "validate_cell",
]
