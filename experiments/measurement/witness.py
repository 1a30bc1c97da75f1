"""Counts the tokens that enter a model, by a hook that no engine of ours writes to.

An arm that returns a remembered token, computes a part of the query, or is given a longer prompt than it says, differs
from its own account here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from kvmem.cache import observing


class Witness:
    """`count` is the number of token ids that the model's embedding has looked up since the witness began."""

    def __init__(self) -> None:
        self.count = 0

    @classmethod
    @contextmanager
    def of(cls, embedding: nn.Module | None) -> Iterator[Witness | None]:
        """A witness that counts inside the block; None where there is no module to watch."""
        if embedding is None:
            yield None
            return
        witness = cls()

        @observing
        def looked_up(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            witness.count += inputs[0].numel()

        hook = embedding.register_forward_pre_hook(looked_up)
        try:
            yield witness
        finally:
            hook.remove()
