"""Random weights made in vLLM's workers: models of any published shape in seconds, without writing to disk."""

from __future__ import annotations

from typing import Any

import torch

from kvmem.models import STD

EXTENSION = f"{__name__}.RandomWeights"
SEED_STRIDE = 1_000_003


class RandomWeights:
    """vLLM mixes this into its worker class (`worker_extension_cls`), so that `collective_rpc` finds the method."""

    model_runner: Any
    """The worker's."""
    rank: int
    """The worker's tensor-parallel rank."""

    @torch.no_grad()
    def fill_with_random_weights(self, seed: int) -> int:
        """Sets norms to 1 and draws all other weights from a normal distribution, as transformers initializes them.

        Weights are set in place, so CUDA graphs stay valid. Each rank draws its own shard.
        Returns how many elements it drew.
        """
        model = self.model_runner.model
        drawn = 0
        for name, parameter in sorted(model.named_parameters()):
            if "norm" in name:
                parameter.fill_(1.0)
                continue
            generator = torch.Generator(device=parameter.device)
            generator.manual_seed(seed * SEED_STRIDE + self.rank * len(name) + drawn)
            parameter.normal_(0.0, STD, generator=generator)
            drawn += parameter.numel()
        return drawn
