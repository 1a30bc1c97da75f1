"""Ctrl-C, SIGTERM and SIGHUP end a command with an exception, and its child processes with it.

Only the standard library is imported here, so that a command can be interrupted while it imports everything else.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

GRACE_S = 5.0
"""How long child processes have to end by themselves before they are killed."""
AGAIN_S = 2.0
"""Some programs pass a signal on twice. Only a signal that comes later than this ends the process at once."""


class Stopped(KeyboardInterrupt):
    """The process was told to end. Libraries clean up as they do after Ctrl-C.

    `exit_status` is 128 plus the signal's number, as shells report it: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        self.exit_status = 128 + number


class _Handler:
    """Raises `Stopped` in the main thread at the first signal."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.stopped: Stopped | None = None
        self.at_s = 0.0
        self.lost = False
        """Whether `stopped` was raised where Python drops exceptions, as in `__del__`."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a forked child has inherited this handler: end as without it
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.stopped is None:
            self.stopped, self.at_s = Stopped(number), time.monotonic()
            raise self.stopped
        elif self.lost:
            self.lost = False
            raise self.stopped
        elif time.monotonic() - self.at_s > AGAIN_S:
            end_processes(grace_s=0)
            os._exit(self.stopped.exit_status)

    def dropped(self, number: int) -> None:
        """Raises `stopped` again, a moment later."""
        self.lost = True
        thread = threading.get_ident()  # the main thread, where a signal also ends a system call that waits
        threading.Timer(0.05, signal.pthread_kill, [thread, number]).start()

    def at_exit(self) -> None:
        if self.stopped is not None and os.getpid() == self.process:
            end_processes()


_handlers: list[_Handler] = []


@contextmanager
def raised() -> Iterator[None]:
    """Within the block, a signal raises `Stopped` in the main thread, once.

    A signal that this process was started to ignore, as by nohup, stays ignored. After a signal, the child processes
    end with this process, after every other function that `atexit` runs: libraries end their own children first. A
    second signal ends all at once.
    """
    handler = _Handler()
    numbers = [number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None))]
    earlier = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    for number in earlier:
        signal.signal(number, handler)
    atexit.register(handler.at_exit)
    _handlers.append(handler)
    report = sys.unraisablehook

    def report_others(dropped: sys.UnraisableHookArgs) -> None:
        if isinstance(dropped.exc_value, Stopped):
            handler.dropped(*dropped.exc_value.args)
        else:
            report(dropped)

    sys.unraisablehook = report_others
    try:
        yield
    finally:
        if handler.stopped is None:
            _handlers.remove(handler)
            atexit.unregister(handler.at_exit)
            sys.unraisablehook = report
            for number, function in earlier.items():
                signal.signal(number, function)


def check() -> None:
    """Raises `Stopped` again if a signal came and a library has swallowed the exception, or made another one of it."""
    for handler in _handlers:
        if handler.stopped is not None:
            raise handler.stopped


def leave_to(process: int) -> None:
    """Leaves it to another process, the one that a user interrupts, to end this one.

    Ctrl-C is ignored here from now on. If the other process is killed, this one ends within a second or so.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        import psutil

        try:
            while psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
                time.sleep(1)
        except psutil.NoSuchProcess:
            pass
        end_processes(grace_s=1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def end_processes(parent: int | None = None, grace_s: float = GRACE_S) -> None:
    """Ends the descendants of a process, by default this one: SIGTERM, and SIGKILL for what is left after `grace_s`."""
    import psutil

    try:
        children = psutil.Process(parent).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    ended = []
    for child in children:
        try:
            if any("resource_tracker" in word for word in child.cmdline()):
                continue  # multiprocessing's: it ends with its parent, and frees what the others leave behind
            child.terminate()
            ended.append(child)
        except psutil.NoSuchProcess:
            continue
    for child in psutil.wait_procs(ended, timeout=grace_s)[1]:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
