"""Timing, output equality and the verdict: how one figure is taken and judged."""

from experiments.measurement.consensus import agreed
from experiments.measurement.equality import Equality, Trace, grade
from experiments.measurement.host_to_device import transfer_s
from experiments.measurement.ttft import Sample, synchronize
from experiments.measurement.verdict import STRAW_MAN, judge

__all__ = ["STRAW_MAN", "Equality", "Sample", "Trace", "agreed", "grade", "judge", "synchronize", "transfer_s"]
