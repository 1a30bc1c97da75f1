"""Measures TTFT, compares outputs, and gives each figure a verdict."""

from experiments.measurement.consensus import from_rank0
from experiments.measurement.engine_adapters import engine_conditions, two_chunkings
from experiments.measurement.equality import Equality, Trace, grade
from experiments.measurement.host_to_device import transfer_s
from experiments.measurement.ttft import Sample, synchronize
from experiments.measurement.verdict import MAX_DIRECT_RATIO, validate_cell

__all__ = [
    "MAX_DIRECT_RATIO",
    "Equality",
    "Sample",
    "Trace",
    "engine_conditions",
    "from_rank0",
    "grade",
    "synchronize",
    "transfer_s",
    "two_chunkings",
    "validate_cell",
]
