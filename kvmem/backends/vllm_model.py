"""The model that a vLLM engine will load, as transformers has it: for its fingerprint, tokenizer and config."""

from __future__ import annotations

import torch

from kvmem import models
from kvmem.backends.hf_config import DTYPES
from kvmem.backends.vllm_config import VLLMConfig

MADE_IN = "vLLM's {} workers"
SAVED_BYTES = 4e9
"""Larger random weights are made by the engine, for it would take longer to save them than to measure."""


def dtype_of(config: VLLMConfig) -> torch.dtype:
    return DTYPES.get(config.dtype) or (torch.bfloat16 if torch.cuda.is_available() else torch.float32)


def described(config: VLLMConfig, dtype: torch.dtype) -> models.Loaded:
    """To be dropped before the engine takes its memory. Random weights are those of the device that they are made on,
    or the engine's own: then this has none, and is on the device meta."""
    name, tokenizer = config.model_name_or_path, config.tokenizer_name_or_path
    random = name.startswith(models.RANDOM)
    if random and config.random_weights != "saved":
        skeleton = models.skeleton(name, dtype, config.seed, tokenizer, MADE_IN.format(config.tensor_parallel_size))
        size = sum(parameter.nbytes for parameter in skeleton.model.parameters())
        if config.random_weights == "in_engine" or size > SAVED_BYTES:
            return skeleton
    device = torch.device("cuda" if torch.cuda.is_available() and random else "cpu")
    return models.load(name, device, dtype, seed=config.seed, tokenizer=tokenizer)
