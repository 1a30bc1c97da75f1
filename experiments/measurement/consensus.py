"""What several processes that measure one run must agree on, for each follows its own clock."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def agreed(value: T) -> T:
    """What the first process says, in a run by several; in any other run `value`."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    said = [value]
    dist.broadcast_object_list(said)
    return said[0]
