"""The pass as CUDA graphs, one a query length and buffer, and what warming up cost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kvmem.engines.graph.kv_buffers import Buffer

WARM_RUNS = 2
"""Before a capture: the first compiles, the second finds all workspaces there."""


@dataclass
class WarmUp:
    """What getting ready has cost so far: compiling and capturing, in seconds, and what graphs hold of the GPU."""

    seconds: float = 0.0
    graphs: int = 0
    graph_bytes: int = 0


class Run(Protocol):
    """A pass over `inputs`, which may end by changing them."""

    def __call__(self, inputs: torch.Tensor, buffer: Buffer) -> tuple[torch.Tensor, torch.Tensor]: ...


class Captured:
    """The pass over a fixed count of new tokens in one buffer; how many rows are held, and the ids, are data."""

    def __init__(self, run: Run, buffer: Buffer, inputs: torch.Tensor, pool: Any, warm_up: WarmUp) -> None:
        """inputs: those of the request at hand, for warming up writes its rows."""
        started = time.perf_counter()
        torch.cuda.synchronize(inputs.device)
        free_bytes, _ = torch.cuda.mem_get_info(inputs.device)
        self.inputs = inputs.clone()
        stream = torch.cuda.Stream(inputs.device)
        stream.wait_stream(torch.cuda.current_stream(inputs.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_RUNS):
                run(self.inputs.clone(), buffer)
        torch.cuda.current_stream(inputs.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.token, self.logits_V = run(self.inputs, buffer)
        torch.cuda.synchronize(inputs.device)
        warm_up.seconds += time.perf_counter() - started
        warm_up.graphs += 1
        warm_up.graph_bytes += max(free_bytes - torch.cuda.mem_get_info(inputs.device)[0], 0)

    def __call__(self, inputs: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """As the pass; None: with the inputs that the last call left. What it returns the next call overwrites."""
        if inputs is not None:
            self.inputs.copy_(inputs)
        self.graph.replay()
        return self.token, self.logits_V
