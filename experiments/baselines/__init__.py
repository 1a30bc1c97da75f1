"""Baselines for comparison: recipes that pass a cache to transformers, and vLLM through its public API."""

from experiments.baselines.base import Recipe, arm, recipes
from experiments.baselines.shared_tensors import SharedTensors
from experiments.measurement.vllm_generate import first_token

__all__ = ["Recipe", "SharedTensors", "arm", "first_token", "recipes"]
