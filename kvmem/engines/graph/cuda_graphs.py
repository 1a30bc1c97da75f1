"""The forward pass as CUDA graphs, one for each query length and buffer, and the cost of warming up."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kvmem.engines.graph.kv_buffers import Buffer

WARM_RUNS = 2
"""Runs before a capture: the first compiles, the second finds all workspaces allocated."""


@dataclass
class WarmUp:
    """The cost of compiling and capturing so far: seconds, and the GPU memory that graphs hold."""

    seconds: float = 0.0
    graphs: int = 0
    graph_bytes: int = 0


class Run(Protocol):
    """A forward pass over `inputs`, which it may update in place."""

    def __call__(self, inputs: torch.Tensor, buffer: Buffer) -> tuple[torch.Tensor, torch.Tensor]: ...


class Captured:
    """The pass for a fixed number of new tokens in one buffer. The number of held rows and the ids are data.

    Made and called with the buffer's GPU as the current device.
    """

    def __init__(self, run: Run, buffer: Buffer, inputs: torch.Tensor, pool: Any, warm_up: WarmUp) -> None:
        """inputs: those of the current request, because warming up writes its rows."""
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
        # On a stream of its own: torch's default one is of the GPU on which the process captured first.
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.token, self.logits_V = run(self.inputs, buffer)
        torch.cuda.synchronize(inputs.device)
        warm_up.seconds += time.perf_counter() - started
        warm_up.graphs += 1
        warm_up.graph_bytes += max(free_bytes - torch.cuda.mem_get_info(inputs.device)[0], 0)

    def __call__(self, inputs: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the pass. None: on the inputs that the last call left. The next call overwrites the returned tensors."""
        if inputs is not None:
            self.inputs.copy_(inputs)
        self.graph.replay()
        return self.token, self.logits_V
