"""The tools of a scenario: the configured model with its memory, injection methods, and comparisons of two arms."""

from experiments.bench.bench import Bench, build_once, builds_s
from experiments.bench.comparison import Measured, compare, p90
from experiments.bench.judging import judging_arms
from experiments.bench.quality import Quality
from experiments.bench.setup import ModelCard, Setup, StorageCard
from experiments.bench.tier_probe import COLD, RECOMPUTE, WARM, TierProbe
from experiments.bench.trace_replay import replay

__all__ = [
    "COLD",
    "RECOMPUTE",
    "WARM",
    "Bench",
    "Measured",
    "ModelCard",
    "Quality",
    "Setup",
    "StorageCard",
    "TierProbe",
    "build_once",
    "builds_s",
    "compare",
    "judging_arms",
    "p90",
    "replay",
]
