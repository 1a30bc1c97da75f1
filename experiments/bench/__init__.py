"""The tools of a scenario: the configured model with its memory, injection methods, and comparisons of two arms."""

from experiments.bench.bench import Bench, build_once, builds_s
from experiments.bench.comparison import Measured, TierEvidence, compare, judged_again, p90, products_of, timed_calls
from experiments.bench.judging import judging_arms
from experiments.bench.open_loop import Load, ServedRequest, alone_sample, serve
from experiments.bench.setup import ModelCard, Setup, StorageCard
from experiments.bench.tier_probe import COLD, RECOMPUTE, WARM, TierProbe, reads_file
from experiments.bench.trace_replay import Replayed, ReplayedMove, ReplayedUse, outcome_of, replay

__all__ = [
    "COLD",
    "RECOMPUTE",
    "WARM",
    "Bench",
    "Load",
    "Measured",
    "ModelCard",
    "Replayed",
    "ReplayedMove",
    "ReplayedUse",
    "ServedRequest",
    "Setup",
    "StorageCard",
    "TierEvidence",
    "TierProbe",
    "alone_sample",
    "build_once",
    "builds_s",
    "compare",
    "judged_again",
    "judging_arms",
    "outcome_of",
    "p90",
    "products_of",
    "reads_file",
    "replay",
    "serve",
    "timed_calls",
]
