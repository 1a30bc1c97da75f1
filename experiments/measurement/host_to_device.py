"""Measures the copy of a memory from pinned host memory to the GPU, a lower bound for injection from the host."""

from __future__ import annotations

import time
from statistics import median

import torch

REPEATS = 7


def transfer_s(nbytes: int, device: torch.device) -> float | None:
    """Median seconds of copying `nbytes` bytes from pinned host memory to `device`; None if `device` is not a GPU."""
    if device.type != "cuda":
        return None
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    times = []
    for _ in range(1 + REPEATS):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return median(times[1:])
