"""Random weights made inside vLLM's workers: a published shape of any size in seconds, and nothing written to disk."""

from __future__ import annotations

import torch

from kvmem.models import STD

EXTENSION = f"{__name__}.RandomWeights"
SEEDS_APART = 1_000_003


class RandomWeights:
    """vLLM mixes this into its worker class (`worker_extension_cls`), so that `collective_rpc` finds the method."""

    @torch.no_grad()
    def fill_with_random_weights(self, seed: int) -> int:
        """Norms 1, all else normal, as random weights made by transformers are; in place, so graphs stay valid. Each
        rank draws its own shard. Returns how many elements it drew."""
        model = self.model_runner.model  # type: ignore[attr-defined]
        drawn = 0
        for name, parameter in sorted(model.named_parameters()):
            if "norm" in name:
                parameter.fill_(1.0)
                continue
            generator = torch.Generator(device=parameter.device)
            generator.manual_seed(seed * SEEDS_APART + self.rank * len(name) + drawn)  # type: ignore[attr-defined]
            parameter.normal_(0.0, STD, generator=generator)
            drawn += parameter.numel()
        return drawn
