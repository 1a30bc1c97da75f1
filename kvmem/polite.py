"""Builds that step aside: between two layers of a build, running requests go first."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from kvmem.errors import BuildCancelled


class BuildGate:
    """Requests and builds share one model. A build that runs in another thread stops before its next layer while any
    request is running, so a request is never held up by more than one layer's work; and it can be called off there."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._requests = 0
        self._cancelled = False
        self._builder: int | None = None
        self.layers_waited = 0
        """How often a build stood aside."""

    @contextmanager
    def request(self) -> Iterator[None]:
        """Inside the block builds of other threads wait."""
        with self._changed:
            self._requests += 1
        try:
            yield
        finally:
            with self._changed:
                self._requests -= 1
                self._changed.notify_all()

    @contextmanager
    def build(self, model: PreTrainedModel) -> Iterator[None]:
        """Inside the block this thread's forward passes step aside. Raises BuildCancelled where `cancel` reached it."""
        with self._changed:
            self._cancelled = False
            self._builder = threading.get_ident()
        hooks = [layer.register_forward_pre_hook(self._before_layer) for layer in model.get_decoder().layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            with self._changed:
                self._builder = None

    def cancel(self) -> None:
        """Calls off the build that is running, if one is; the next one is not concerned."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    def _before_layer(self, *_: Any) -> None:
        if threading.get_ident() != self._builder:
            return
        with self._changed:
            while self._requests and not self._cancelled:
                self.layers_waited += 1
                self._changed.wait()
            if self._cancelled:
                raise BuildCancelled("The build was called off: its text changed, or the scheduler is closing.")
