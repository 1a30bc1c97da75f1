"""Keeps the ranks of a run in step: rank 0 makes every decision that depends on timing."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def from_rank0(value: T) -> T:
    """Broadcasts rank 0's `value` and returns it on every rank. A run of one process returns its own `value`."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]
