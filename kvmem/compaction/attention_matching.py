"""Attention Matching: fewer keys, with biases and fitted values, that give the attention output of all of them."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from kvmem.compaction.base import CompactionStrategy, Head, Memory
from kvmem.compaction.least_squares import bounded_least_squares, matching_pursuit
from kvmem.compaction.observed_queries import Behind
from kvmem.compaction.token_choice import entries_of

FAST_BIAS = 3.0
"""Biases of fast keys are between minus this and this."""
PURSUIT_BIAS = 7.0
"""Biases of pursued keys are at most this; an entry whose bias would be below minus this is dropped."""
RIDGE = 1e-6
"""How much the fitted values are held to the chosen entries' own, as a share of the mean square of the attention."""


@dataclass(config=ConfigDict(extra="forbid"))
class AttentionMatching(CompactionStrategy):
    """Chooses keys, and fits biases β and values C so that softmax(q·kᵀ + β)·C is the attention output of the memory.

    The queries are those of the model repeating the memory. With `on_policy` those of a layer are computed behind
    compacted layers, as they will be. Zweiger et al., "Fast KV Compaction via Attention Matching", 2026 (arXiv
    2602.16284). Every head keeps as many entries here; the paper's budgets by head are not implemented.
    """

    ratio: float = Field(default=0.1, gt=0, le=1)
    """The share of the entries that is kept, rounded up to whole entries."""
    search: Literal["fast", "pursuit"] = "fast"
    """fast: the keys with the largest root mean square of attention. pursuit: orthogonal matching pursuit."""
    fit_bias: bool = True
    """Whether biases are fitted; otherwise there are none."""
    fit_values: bool = True
    """Whether values are fitted; otherwise they are the chosen entries' own."""
    on_policy: bool = True
    most_queries: int = Field(default=50_000, ge=1)
    """At most so many queries of each KV head are looked at, evenly spaced."""

    name: ClassVar[str] = "AttentionMatching"

    @torch.inference_mode()
    def compact(self, memory: Memory) -> list[list[Head]]:
        count = entries_of(self.ratio, memory.tokens)
        layers: list[list[Head]] = []

        def see(layer: int, behind: Behind) -> torch.Tensor | None:
            keys_HSD, values_HSD = (tensor[0] for tensor in memory.layers[layer])
            heads = [
                self._matched(keys_SD, values_SD, behind.of_head(head), count)
                for head, (keys_SD, values_SD) in enumerate(zip(keys_HSD, values_HSD, strict=True))
            ]
            layers.append(heads)
            return _output(behind, heads) if self.on_policy else None

        memory.observe(see)
        return layers

    def _matched(self, keys_SD: torch.Tensor, values_SD: torch.Tensor, queries_ND: torch.Tensor, count: int) -> Head:
        """What one head keeps, for queries that are scaled already."""
        every = max(1, math.ceil(len(queries_ND) / self.most_queries))
        scores_NS = queries_ND[::every] @ keys_SD.float().T
        mass_NS, whole_N = _mass(scores_NS)
        attention_NS = mass_NS / whole_N[:, None]
        at_K, weights_K = self._chosen(mass_NS, whole_N, attention_NS, count)
        bias_K = weights_K.log().to(keys_SD.dtype) if self.fit_bias else None
        if not self.fit_values:
            return Head(keys_SD[at_K], values_SD[at_K], bias_K)
        # In float64, and by the same steps as the attention to all entries, so that nothing is fitted to rounding.
        compacted_NK, sum_N = _mass(scores_NS[:, at_K] + (0 if bias_K is None else bias_K.float()))
        compacted_NK = compacted_NK / sum_N[:, None]
        missing_ND = attention_NS @ values_SD.double() - compacted_NK @ values_SD[at_K].double()
        fitted_KD = values_SD[at_K].double() + _ridge(compacted_NK, missing_ND)
        return Head(keys_SD[at_K], fitted_KD.to(values_SD.dtype), bias_K)

    def _chosen(
        self, mass_NS: torch.Tensor, whole_N: torch.Tensor, attention_NS: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The entries that are kept, ascending, and by what their attention is multiplied so that it adds up to that of
        all."""
        if self.search == "fast" or count == mass_NS.shape[1]:
            at_K = torch.linalg.vector_norm(attention_NS, dim=0).topk(count).indices.sort()[0]
            weights_K = bounded_least_squares(
                mass_NS[:, at_K], whole_N, low=math.exp(-FAST_BIAS), high=math.exp(FAST_BIAS)
            )
            return at_K, weights_K
        at_K, weights_K = matching_pursuit(mass_NS, whole_N, count, low=1e-12, high=math.exp(PURSUIT_BIAS))
        kept_K = weights_K >= min(math.exp(-PURSUIT_BIAS), float(weights_K.max()))
        at_K, order_K = at_K[kept_K].sort()
        return at_K, weights_K[kept_K][order_K]


def _mass(scores_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The exponential of each score, less the largest of its row, and the sum of each row, in float64."""
    mass_NK = (scores_NK - scores_NK.amax(dim=1, keepdim=True)).exp().double()
    return mass_NK, mass_NK.sum(dim=1)


def _ridge(columns_NK: torch.Tensor, target_ND: torch.Tensor) -> torch.Tensor:
    """The smallest correction X for which columns · X comes near the target, (columns, head_dim)."""
    gram_KK = columns_NK.T @ columns_NK
    gram_KK.diagonal().add_(RIDGE * gram_KK.diagonal().mean())
    correction_KD: torch.Tensor = torch.linalg.solve(gram_KK, columns_NK.T @ target_ND)
    return correction_KD


def _output(behind: Behind, heads: list[Head]) -> torch.Tensor:
    """What attention gives behind the compacted layer, (kv_heads, groups, tokens, head_dim)."""
    outputs = []
    for head, kept in enumerate(heads):
        values_ND = torch.cat([kept.values_ND, behind.values_HTD[head]]).float()
        bias_N = None if kept.bias_N is None else kept.bias_N.float()
        parts = [part @ values_ND for part in behind.attention(head, kept.keys_ND, bias_N)]
        outputs.append(torch.cat(parts, dim=1))
    return torch.stack(outputs)
