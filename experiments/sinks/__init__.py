"""Where rows go: a JSONL file always, and Weights & Biases or nothing besides."""

from experiments.sinks.base import Sink
from experiments.sinks.jsonl import JSONL
from experiments.sinks.wandb import WandB, log_run

__all__ = ["JSONL", "Sink", "WandB", "log_run"]
