"""Other ways to use a cache, to compare with: recipes for transformers, and vLLM as others run it."""

from experiments.baselines.base import Recipe, arm, recipes
from experiments.baselines.shared_tensors import SharedTensors
from experiments.baselines.vllm_generate import first_token

__all__ = ["Recipe", "SharedTensors", "arm", "first_token", "recipes"]
