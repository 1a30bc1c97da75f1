"""Baselines for comparison: recipes that pass a cache to transformers, and vLLM through its public API."""

from experiments.baselines.base import Recipe, arm, recipes
from experiments.baselines.shared_tensors import SharedTensors

__all__ = ["Recipe", "SharedTensors", "arm", "recipes"]
