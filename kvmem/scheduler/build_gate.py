"""Lets requests go before builds: a build pauses between two layers while requests run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvmem.errors import BuildCancelled


class BuildGate:
    """Shares one model between requests and a build in another thread.

    While requests run, the build computes at most one layer beside each of them and then waits. So no request is
    delayed by more than one layer's work, and a build makes progress even if there is always a request. A build can be
    cancelled between two layers. The engine calls `between_layers`; the gate knows nothing of models.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: dict[object, bool] = {}
        """Running requests, and whether a layer of a build was computed beside each."""
        self._cancelled = False
        self.layers_waited = 0
        """How often a build has waited."""

    @contextmanager
    def request(self) -> Iterator[None]:
        """Inside the block, a build computes one layer at most."""
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
    def build(self) -> Iterator[Callable[[], None]]:
        """One build; gives `between_layers`. `cancel` reaches the build from the start of the block on."""
        with self._changed:
            self._cancelled = False
        yield self.between_layers

    def between_layers(self) -> None:
        """Waits until the next layer may be computed. Raises BuildCancelled if the build was cancelled."""
        with self._changed:
            while any(self._running.values()) and not self._cancelled:
                self.layers_waited += 1
                self._changed.wait()
            if self._cancelled:
                raise BuildCancelled("The build was cancelled: its text changed, or the scheduler is closing.")
            self._running = dict.fromkeys(self._running, True)

    def cancel(self) -> None:
        """Cancels the running build, if there is one. The next build is not affected."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()
