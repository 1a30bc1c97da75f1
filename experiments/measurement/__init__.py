"""Measures TTFT, compares outputs, and gives each figure a verdict."""

from experiments.measurement.consensus import from_rank0
from experiments.measurement.derived_verdict import judge_derived
from experiments.measurement.engine_adapters import embedding_of, engine_conditions, products_seen, reference_forward
from experiments.measurement.equality import NOISE_MULTIPLE, Equality, Trace, grade
from experiments.measurement.host_to_device import transfer_s
from experiments.measurement.reference import Layers, ReferenceForward, comparable
from experiments.measurement.timing_verdict import judge_timings
from experiments.measurement.ttft import Arm, Sample, synchronize
from experiments.measurement.verdict import BASELINE, MAX_DIRECT_RATIO, RULES_VERSION, Verdict, clock_misses, judge
from experiments.measurement.vllm_generate import ColdAnswer
from experiments.measurement.witness import Witness

__all__ = [
    "BASELINE",
    "MAX_DIRECT_RATIO",
    "NOISE_MULTIPLE",
    "RULES_VERSION",
    "Arm",
    "ColdAnswer",
    "Equality",
    "Layers",
    "ReferenceForward",
    "Sample",
    "Trace",
    "Verdict",
    "Witness",
    "clock_misses",
    "comparable",
    "embedding_of",
    "engine_conditions",
    "from_rank0",
    "grade",
    "judge",
    "judge_derived",
    "judge_timings",
    "products_seen",
    "reference_forward",
    "synchronize",
    "transfer_s",
]
