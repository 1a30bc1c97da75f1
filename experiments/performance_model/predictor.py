"""Predicts TTFT from FLOP, bytes, all-reduces and launches, a layout's rates, and an engine's efficiencies.

It needs no GPU and loads no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from experiments.hardware import Hardware
from experiments.performance_model.calibration import datasheet
from experiments.performance_model.roofline import DenseShape, prefill_bytes, prefill_flop

ALL_REDUCES_A_LAYER = 2
"""One after attention and one after the MLP (Shoeybi et al., Megatron-LM, 2019)."""
ALL_REDUCE_LATENCY_S = 12e-6
"""The latency of an all-reduce of any size: two kernels and their synchronisation."""

RIDGE = 4
"""The sharpness of the roofline's ridge. Compute and reads that take about equally long overlap only partly.

The value was chosen among 1.5 to 4 and infinity (the larger of both) with rows of the graph engine on an H100 and an
H200. LOG.md has the errors.
"""


@dataclass(frozen=True)
class Engine:
    """An engine's efficiencies. The defaults describe CUDA graphs with FlashAttention on a data-centre GPU.

    The first five are shares of a stated rate.
    """

    products: float = 0.75
    """The share of the peak FLOP rate in matrix products."""
    attention: float = 0.4
    """The share of the peak FLOP rate in attention."""
    bandwidth: float = 0.85
    """The share of the memory bandwidth."""
    interconnect: float = 0.7
    """The share of the interconnect's one-way rate."""
    host_link: float = 0.8
    """The share of the host link's rate."""
    fixed_s: float = 0.003
    """Host time of every request: scheduling, sampling, and copying the token."""
    launches_s: float = 0.0
    """The shortest time of a forward pass whose kernels are launched one by one; 0 with CUDA graphs."""


class Prefill(NamedTuple):
    """A prefill of `new_tokens` tokens after `cached_tokens`. `moved_bytes` of KV are fetched from host memory."""

    new_tokens: int
    cached_tokens: int
    moved_bytes: float = 0.0


@dataclass(frozen=True)
class Layout:
    """A model on a hardware layout."""

    shape: DenseShape
    hardware: Hardware
    dtype: str = "bfloat16"
    host_gb_s: float = 55.0
    """The one-way rate between a GPU and host memory."""
    network_gb_s: float = 12.5
    """The one-way rate between nodes."""

    @property
    def element_bytes(self) -> int:
        return int(getattr(torch, self.dtype).itemsize)

    @property
    def kv_bytes_a_token(self) -> int:
        return 2 * len(self.shape.windows) * self.shape.kv_heads * self.shape.head_dim * self.element_bytes

    @property
    def bytes_a_memory(self) -> int:
        """What a memory takes besides its tokens: the states of a hybrid."""
        return self.shape.state_bytes

    def memory_bytes(self, tokens: int) -> int:
        """What a memory of so many tokens takes."""
        return tokens * self.kv_bytes_a_token + self.bytes_a_memory

    @property
    def fits(self) -> bool:
        """Whether weights and embeddings take at most 90% of the GPUs' memory."""
        weights = self.shape.weights + self.shape.vocab * self.shape.hidden
        memory_bytes = self.hardware.gpus * (self.hardware.memory_gb or 0) * 1e9
        return weights * self.element_bytes <= 0.9 * memory_bytes

    def ttft_s(self, prefill: Prefill, engine: Engine) -> float:
        """The TTFT of a single request, in seconds.

        Only tensor-parallel ranks divide the work, because pipeline stages run one after another.
        """
        ranks = self.hardware.tensor_parallel
        rates = datasheet(self.hardware, self.dtype)
        flop_per_s, bytes_per_s = (rate * ranks / self.hardware.gpus for rate in (rates.flop_per_s, rates.bytes_per_s))
        work_s = self._kernels_s(prefill, engine, flop_per_s, bytes_per_s)
        work_s += self._all_reduces_s(prefill.new_tokens, engine)
        work_s += self._hops_s(prefill.new_tokens)
        link_bytes_per_s = ranks * self.host_gb_s * 1e9 * engine.host_link  # each rank fetches its own heads
        return engine.fixed_s + max(engine.launches_s, work_s) + prefill.moved_bytes / link_bytes_per_s

    def _kernels_s(self, prefill: Prefill, engine: Engine, flop_per_s: float, bytes_per_s: float) -> float:
        new, cached, _ = prefill
        shape = self.shape
        products = 2.0 * new * shape.body_weights + 2 * shape.vocab * shape.hidden
        attention = prefill_flop(shape, new, cached) - products
        kv_bytes = self.memory_bytes(cached + new)
        weight_bytes = prefill_bytes(shape, 0, 0, self.element_bytes)
        streams_s = bytes_per_s * engine.bandwidth
        return _overlapped_s(products / (flop_per_s * engine.products), weight_bytes / streams_s) + _overlapped_s(
            attention / (flop_per_s * engine.attention), kv_bytes / streams_s
        )

    def _all_reduces_s(self, tokens: int, engine: Engine) -> float:
        ranks, gb_s = self.hardware.tensor_parallel, self.hardware.interconnect_gb_s
        if ranks == 1 or gb_s is None:
            return 0.0
        sent = 2 * (ranks - 1) / ranks * tokens * self.shape.hidden * self.element_bytes
        count = ALL_REDUCES_A_LAYER * self.shape.layers
        return count * (ALL_REDUCE_LATENCY_S + sent / (gb_s * 1e9 * engine.interconnect))

    def _hops_s(self, tokens: int) -> float:
        """Seconds of sending the hidden states from node to node."""
        hops = self.hardware.pipeline_parallel - 1
        return hops * tokens * self.shape.hidden * self.element_bytes / (self.network_gb_s * 1e9)


def _overlapped_s(compute_s: float, read_s: float) -> float:
    """The seconds of overlapping compute and reads: between the longer of the two and 2^(1/RIDGE) times it."""
    return float((compute_s**RIDGE + read_s**RIDGE) ** (1 / RIDGE))
