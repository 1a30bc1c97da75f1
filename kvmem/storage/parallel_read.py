"""A file's body to a device: threads read regions into pinned memory, verify them there, and send them on.

What is verified is what is sent, byte for byte, and each region crosses the CPU's cache once. Three things overlap: the
reads (several at a time, which a disk wants too), the hashing, and the copies to the device.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

import torch

from kvmem.storage.checksums import Regions, damaged, in_threads, threads_for

BUFFERS_A_THREAD = 2
"""One is filled while the other is sent."""

Span = tuple[int, int]
"""Where something starts and ends, in bytes of the body."""


class _Buffer:
    """Host memory of one region, pinned beside a GPU, and the copy that still reads from it."""

    def __init__(self, size_bytes: int, on_gpu: bool) -> None:
        self.bytes_N = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        self.view = memoryview(cast(Any, self.bytes_N.numpy()))
        self.copied = torch.cuda.Event() if on_gpu else None

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()

    def sent(self) -> None:
        """Says that what was copied from here on this thread's stream is on its way."""
        if self.copied is not None:
            self.copied.record()


def read(
    file: io.FileIO, body_at: int, regions: Regions, spans: Sequence[Span], device: torch.device, path: Path
) -> list[torch.Tensor]:
    """For each span of the body one allocation on `device`, uint8, filled from `file`, whose body begins at `body_at`.

    When this returns every region has been verified and has arrived, so any stream may use the tensors. The host waits
    for the last region's copy; to order it on the caller's stream would save that, and be wrong for who has two.
    Raises DamagedFileError if a region does not fit its checksum, or OSError.
    """
    targets = [torch.empty(end - start, dtype=torch.uint8, device=device) for start, end in spans]
    if not len(regions):
        return targets
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))  # the targets' memory may be in use there until now
    # torch keeps pinned memory that is let go, so only the first load of a process pays for getting it.
    free: SimpleQueue[_Buffer] = SimpleQueue()
    for _ in range(min(BUFFERS_A_THREAD * threads_for(len(regions)), len(regions))):
        free.put(_Buffer(regions.region_bytes, stream is not None))

    @torch.inference_mode()  # a thread has a mode of its own, and the targets may be of the caller's
    def move(i: int) -> None:
        buffer = free.get()  # the one that was handed back first: its copy is the likeliest to be done
        start, end = regions.span(i)
        buffer.wait()
        data = buffer.view[: end - start]
        if not read_exactly(file, data, body_at + start):
            raise damaged(path)
        regions.check(i, data, path)
        for target, (first, last) in zip(targets, spans, strict=True):
            low, high = max(start, first), min(end, last)
            if low < high:
                target[low - first : high - first].copy_(buffer.bytes_N[low - start : high - start], non_blocking=True)
        buffer.sent()
        free.put(buffer)  # not so where the region is refused: its thread ends, and there is one for each that goes on

    try:
        in_threads(move, len(regions), partial(torch.cuda.set_stream, stream) if stream is not None else None)
    finally:  # also where a region was refused: the targets are freed then, and copies may be on their way to them
        if stream is not None:
            stream.synchronize()
    return targets


def read_exactly(file: io.FileIO, data: memoryview, at: int) -> bool:
    """Fills `data` from byte `at` of the file on; False if the file ends before. Any number of threads may."""
    while data:
        got = os.preadv(file.fileno(), [data], at)
        if not got:
            return False
        data, at = data[got:], at + got
    return True
