"""What scenarios measure on: the configured model, its memory, and comparisons of two arms."""

from experiments.bench.bench import Bench, build_s, built_once
from experiments.bench.comparison import Arm, compare, p90
from experiments.bench.quality import Quality
from experiments.bench.setup import ModelCard, Setup, StorageCard
from experiments.bench.tier_probe import COLD, RECOMPUTE, WARM, InEveryTier
from experiments.bench.trace_replay import replay

__all__ = [
    "COLD",
    "RECOMPUTE",
    "WARM",
    "Arm",
    "Bench",
    "InEveryTier",
    "ModelCard",
    "Quality",
    "Setup",
    "StorageCard",
    "build_s",
    "built_once",
    "compare",
    "p90",
    "replay",
]
