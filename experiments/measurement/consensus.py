"""Keeps the processes of one run in step: decisions that depend on timing are taken by rank 0."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def agreed(value: T) -> T:
    """Broadcasts rank 0's value; `value` itself in a run of one process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]
