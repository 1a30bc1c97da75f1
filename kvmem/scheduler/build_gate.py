"""Builds that step aside: running requests go first, between any two layers of a build."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from kvmem.errors import BuildCancelled


class BuildGate:
    """Requests and builds share one model. A build in another thread computes its next layer only while it has run
    beside none of the requests that are running: no request is held up by more than one layer's work, and a build gets
    on even where requests never cease. It can be called off between two layers."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: dict[object, bool] = {}
        """Running requests, and whether a layer of a build was computed beside each."""
        self._cancelled = False
        self._builder: int | None = None
        self.layers_waited = 0
        """How often a build stood aside."""

    @contextmanager
    def request(self) -> Iterator[None]:
        """Inside the block a build of another thread computes one layer at most."""
        request = object()
        with self._changed:
            self._running[request] = False
        try:
            yield
        finally:
            with self._changed:
                del self._running[request]
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
            while any(self._running.values()) and not self._cancelled:
                self.layers_waited += 1
                self._changed.wait()
            if self._cancelled:
                raise BuildCancelled("The build was called off: its text changed, or the scheduler is closing.")
            self._running = dict.fromkeys(self._running, True)
