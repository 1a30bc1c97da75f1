"""Runs a configuration cell by cell, with checkpoints: as one job, as a sweep, on several ranks or on a cluster."""

from experiments.execution.experiment import run_experiment
from experiments.execution.ranks import run_job
from experiments.execution.runner import (
    NOT_ALL_VALID,
    OUT_OF_MEMORY_ADVICE,
    UNDECIDED,
    WRONG_COMMAND,
    JobFailed,
    doubts,
    log,
    measure_one,
    mixtures,
    problems,
    run,
)

__all__ = [
    "NOT_ALL_VALID",
    "OUT_OF_MEMORY_ADVICE",
    "UNDECIDED",
    "WRONG_COMMAND",
    "JobFailed",
    "doubts",
    "log",
    "measure_one",
    "mixtures",
    "problems",
    "run",
    "run_experiment",
    "run_job",
]
