"""Destinations of rows. Every run writes a JSONL file, and by default also sends its rows to Weights & Biases."""

from experiments.sinks.base import Sink
from experiments.sinks.guarded import Guarded
from experiments.sinks.jsonl import JSONL
from experiments.sinks.wandb import WandB, as_logged, log_run, logged_rows

__all__ = ["JSONL", "Guarded", "Sink", "WandB", "as_logged", "log_run", "logged_rows"]
